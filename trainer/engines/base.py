"""What an engine must do. Nothing outside `trainer/engines` knows which engine runs.

One update is: any number of `forward_backward`, the last one marked, then one `update`. All ranks make the same calls
in the same order, with the same number of micro batches: each call may hold collectives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from trainer.checkpoint.load import Checkpoint
from trainer.checkpoint.pieces import Piece
from trainer.data.loader import MicroBatch


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the checkpoint sees it: its global shape and stored dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Engine(Protocol):
    device: torch.device

    def initialise(self, seed: int) -> None:
        """Fill every parameter from (seed, its name): the same values at every world size and layout."""

    def set_trainable(self, names: Iterable[str]) -> None:
        """Exactly these parameters train from now on; the rest get no gradient and no optimizer state. A collective:
        an engine may have to build itself anew, and loses optimizer state then; `load` brings it back."""

    def forward_backward(self, micro_batch: MicroBatch, scale: torch.Tensor, last: bool) -> torch.Tensor:
        """Add this micro batch's gradients. `scale` is 1 / the step's global target count (0-d, on the device): the
        engine undoes its backend's own averaging, so gradients are plain sums over ranks. After the `last` one they are
        synchronised; an engine may do so earlier. Returns the task's sums, fp64 [columns], of this rank alone."""

    def update(self, lr_factor: float, clip: float | None, guard: torch.Tensor) -> float:
        """Clip, update, clear gradients; returns the global gradient norm before clipping.

        `guard` is a 0-d number of this rank that is finite when all is well (0 x its losses). When the norm or any
        rank's guard is not finite, nothing is applied on any rank and the result is not finite. The gradients are
        gone either way."""

    def evaluate(self, micro_batch: MicroBatch) -> torch.Tensor:
        """The task's sums, fp64 [columns], of this rank alone, without dropout or gradients."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) token ids -> (B, V) logits of the last position. All ranks call it together."""

    def parameters(self) -> dict[str, TensorInfo]:
        """Every parameter by name, tied ones once under their first name."""

    def aliases(self) -> dict[str, str]:
        """Further names of tied parameters -> first name."""

    def trainable(self) -> set[str]:
        """Names of the parameters that train."""

    def gradients(self) -> dict[str, torch.Tensor]:
        """This rank's local gradients by name, between `forward_backward` and `update`; for checks, not for speed."""

    def pieces(self) -> list[Piece]:
        """This rank's part of parameters and optimizer state, without communication. The tensors are live."""

    def flops_per_token(self, seq_len: int) -> float:
        """Forward and backward of one token, for what trains now (`models.flops`)."""

    def step_counts(self) -> dict[str, int]:
        """Updates that the optimizer has counted, per parameter that has state."""

    def optimizer_keys(self) -> set[str]:
        """`<parameter>.<state>` for every optimizer tensor there is or, before the first update, will be."""

    def load(self, checkpoint: Checkpoint, with_optimizer: bool) -> None:
        """Read parameters, and optimizer state when asked, into place. What is there was planned and agreed before. No
        collective: a rank may meet a bad block and raise BadCheckpoint while the others read on."""

    def after_load(self) -> None:
        """Once all ranks have loaded: bring low-precision copies up to date. A collective."""
