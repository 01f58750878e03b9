"""Activation checkpointing: what a block recomputes in backward instead of keeping."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from models import Model

MATRIX_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def checkpoint_activations(model: Model, how: Literal["none", "selective", "full"]) -> None:
    """Make each block recompute its activations in backward.

    The block's `forward` is replaced rather than the block wrapped, so that parameter names stay as they are.
    """
    if how == "none":
        return
    # Keeping the random state costs time in each block; a block that draws nothing gives the same without it.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": model.random}
    if how == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in model.blocks:
        block.forward = _recomputed(block.forward, settings)


def _recomputed(forward: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **settings, **kwargs)

    return recomputed


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in MATRIX_PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
