"""What an engine must do. Nothing outside `trainer/engines` knows which engine runs.

One update is: any number of `forward_backward`, the last one marked, then one `update`. All ranks make the same calls
in the same order, with the same number of micro batches: each call may hold collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.load.plan import TensorInfo
from trainer.checkpoint.load.request import Loading
from trainer.data.batch import Batch

T = TypeVar("T")


class Engine(Protocol):
    """A new engine knows names and shapes; `set_trainable` builds it, `initialise` and `load` give it values."""

    device: torch.device

    def set_trainable(
        self, names: Iterable[str], held_elsewhere: Iterable[str] = (), counts: Mapping[str, int] | None = None
    ) -> None:
        """Build the engine so that exactly these parameters train. The rest get no gradient and no optimizer state.

        held_elsewhere: parameters whose originals a checkpoint holds. The engine may keep a copy in the compute dtype.
        counts: per parameter, how many updates its saved optimizer state has seen. ZeRO needs it to group parameters.
        All values are lost, so `initialise` or `load` must follow. A collective."""

    def initialise(self, seed: int, names: Iterable[str] | None = None) -> None:
        """Fill parameters and buffers (default: all) from (seed, name): the same values at every world size and layout.
        A collective."""

    def forward_backward(self, batch: Batch, scale: Callable[[], torch.Tensor], last: bool) -> torch.Tensor:
        """Add this micro batch's gradients, and return this rank's sums of the task, fp64 [columns].

        scale: gives 1 / the step's global weight, fp32 0-d, on the device. The engine asks after its forward: until
        then the ranks are still summing it. The engine undoes its backend's averaging, so that gradients are plain sums
        over ranks. last: the gradients must be synchronised when this returns. A loss that
        is not finite makes the gradient norm NaN. The ranks of a tensor group return the same."""

    def update(self, lr_factor: float, clip: float | None) -> torch.Tensor:
        """Clip, update, and clear the gradients. Returns the global gradient norm before clipping, fp64 0-d, on the
        device. If the norm is not finite, no rank applies the update: that is decided on the device, too."""

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """The task's sums as `forward_backward` returns them, without dropout or gradients."""

    def call(self, function: Callable[[Callable[..., Any]], T]) -> T:
        """What the function makes of the model's forward, without dropout or gradients. All ranks call it together,
        and make the same calls inside."""

    def parameters(self) -> dict[str, TensorInfo]:
        """Every parameter by name, as the optimizer would see it; tied ones once under their first name."""

    def buffers(self) -> dict[str, TensorInfo]:
        """Every persistent buffer by name; each rank holds all of them, with equal content."""

    def aliases(self) -> dict[str, str]:
        """Further names of tied parameters -> first name."""

    def state_keys(self, name: str) -> tuple[str, ...]:
        """Names of the tensors that the optimizer keeps for a parameter that trains, each of the parameter's shape."""

    def counts_steps(self, name: str) -> bool:
        """Whether the optimizer keeps a step count for this parameter (bias correction)."""

    def trainable(self) -> set[str]:
        """Names of the parameters that train."""

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by name, at least this rank's part, between `forward_backward` and `update`; for checks, not for
        speed. A collective."""

    def pieces(self) -> list[Piece]:
        """This rank's part of parameters, buffers and optimizer state, without communication. The tensors are live."""

    def flops(self, example: Batch) -> float:
        """Forward and backward of this batch, for what trains now. Only the shapes of its tensors count."""

    def step_counts(self) -> dict[str, int]:
        """Updates that the optimizer has counted, per parameter that has state."""

    def load(self, loading: Loading) -> None:
        """Read what was planned into place: parameters, buffers and optimizer state. What is there was agreed before.
        No collective: a rank may meet a bad block and raise BadCheckpoint while the others read on."""

    def after_load(self) -> None:
        """Once all ranks have loaded: bring low-precision copies up to date. A collective."""

    def close(self) -> None:
        """Remove what lies on disk. The last call; no collective, as other ranks may be gone."""
