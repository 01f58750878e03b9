"""Where DeepSpeed keeps what this rank owns. The only file that knows DeepSpeed's inside, of 0.19.8 and its fixes.

Parameters that train lie end to end in flat fp32 tensors, the masters, which the torch optimizer steps as if each were
one parameter. Stages 1 and 2 cut the flat tensor of a group into equal parts, one per rank, wherever that falls; stage
3 cuts each parameter, and a rank's parts of all of them make its flat tensor. What forward reads is another copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Fragment:
    """What this rank owns of a parameter: `length` elements of its row-major order from `start` on, which lie in the
    flat tensor of number `flat` from `offset` on. Perhaps none."""

    start: int
    length: int
    flat: int
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This fragment of the flat tensor, or of a state of the same form; shares its memory."""
        return flat.detach()[self.offset : self.offset + self.length]


def share_of(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """(start, length) of a rank's part of a tensor that is cut into as many equal ones, as stage 3 cuts it."""
    size = -(-numel // ranks)
    start = min(size * rank, numel)
    return start, min(size, numel - start)


class Partitions:
    """One DeepSpeed engine's parts on this rank. `groups` are the names in each parameter group of its optimizer."""

    def __init__(self, engine: Any, stage: int, trained: Mapping[str, nn.Parameter], groups: Sequence[Sequence[str]]):
        self._engine, self._stage, self._trained = engine, stage, trained
        self._zero = engine.optimizer
        self.optimizer: torch.optim.Optimizer = self._zero.optimizer
        if stage == 3:
            names = {id(parameter): name for name, parameter in trained.items()}
            self.flats: list[torch.Tensor] = self._zero.fp32_partitioned_groups_flat
            self.names = [[names[id(parameter)] for parameter in group] for group in self._zero.fp16_groups]
        else:
            self.flats = [group["params"][0] for group in self.optimizer.param_groups]
            self.names = [list(group) for group in groups]
        number = {name: k for k, group in enumerate(self.names) for name in group}
        self.fragments = {name: self._fragment(p, number[name]) for name, p in trained.items()}

    def _fragment(self, parameter: Any, flat: int) -> Fragment:
        if self._stage == 3:
            _, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = min(size * self._rank, parameter.ds_numel)  # the last ranks' parts are filled up with padding
            return Fragment(start, min(size, parameter.ds_numel - start), flat, offset)
        mapping = parameter._hp_mapping
        if mapping is None:  # all of it lies on other ranks
            return Fragment(0, 0, flat, 0)
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(there.start, there.numel, flat, here.start)

    @property
    def _rank(self) -> int:
        return int(self._engine.global_rank)

    def frozen(self, parameter: Any) -> tuple[int, torch.Tensor]:
        """(start, elements) of what forward reads of a parameter that does not train: whole at stages 1 and 2."""
        if self._stage < 3:
            return 0, parameter.detach().view(-1)
        start, length = share_of(parameter.ds_numel, self._rank, self._engine.dp_world_size)
        return start, parameter.ds_tensor.detach()[:length]

    @torch.no_grad()
    def copy_to_compute(self) -> None:
        """Bring what forward reads up to date with the masters, and with what `frozen` gave. A collective."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero.checkpoint_event_prologue()
        for number in range(len(self.flats)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        self._zero.checkpoint_event_epilogue()

    def clear(self) -> None:
        """What a step leaves behind: at stage 3 a parameter that is not used in the next step would get this one's
        gradient again, and padding would keep a NaN; offloaded at stages 1 and 2 in bf16, a step that is skipped
        leaves its gradients for the next one to be added to."""
        buffer = getattr(self._zero, "grad_partitions_flat_buffer", None)
        if buffer is not None:
            buffer.zero_()
        averaged: dict[int, Any] = getattr(self._zero, "averaged_gradients", {}) if self._stage < 3 else {}
        averaged.update(dict.fromkeys(averaged))

    def gradient(self, name: str) -> torch.Tensor | None:
        """The whole gradient of a parameter, between backward and the step. A collective."""
        from deepspeed.utils import safe_get_full_grad

        found: torch.Tensor | None = safe_get_full_grad(self._trained[name])
        return found


def partition_module(module: nn.Module, settings: dict[str, Any], like: Any | None) -> None:
    """Cut a module's own parameters for stage 3, which `like`, one that was cut before, knows how to. A collective."""
    import deepspeed

    if like is None:
        deepspeed.zero.Init(module=module, config_dict_or_path=settings)
    else:
        like.convert_to_zero_parameters(param_list=list(module.parameters(recurse=False)))
