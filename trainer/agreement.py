"""One agreed step: every wish to leave travels in a reduction that the step makes anyway."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trainer.life.stop import Cause, Kind, StopWish
from trainer.ranks.world import World


class Agreement:
    """Sums numbers over the data ranks, and carries every rank's wish along.

    The sums stay on the device. The wishes are read after the step that the reduction began: by then they lie in host
    memory, nothing waits for them, and all ranks read the same numbers, so all leave at the same step.
    """

    def __init__(self, world: World, wish: StopWish, asked: Callable[[], bool] = lambda: False) -> None:
        self.world, self.wish, self._asked = world, wish, asked
        self._wishes: torch.Tensor | None = None  # by kind, and last how many ranks ask for a profile

    def sum(self, values: list[float] | torch.Tensor) -> torch.Tensor:
        """fp64 [n] summed over the data ranks, on the device. A collective of all ranks."""
        numbers = torch.as_tensor(values, dtype=torch.float64, device=self.world.device)
        if not self.world.counts:
            numbers = torch.zeros_like(numbers)  # the first rank of the tensor group gives them
        cause = self.wish.poll()
        told = [float(cause is not None and cause.kind is kind) for kind in Kind] + [float(self._asked())]
        wishes = torch.tensor(told, dtype=torch.float64)
        both = torch.cat([numbers, wishes.to(self.world.device, non_blocking=True)])
        self.world.sum(both)
        # On a GPU this copy runs behind the reduction; whoever reads it has synchronised with a later result.
        self._wishes = both[len(numbers) :].to("cpu", non_blocking=True)
        return both[: len(numbers)]

    def outcome(self) -> Cause | None:
        """What the last reduction decided: the same kind on every rank. Call only after the device was synchronised."""
        if self._wishes is None:
            return None
        asked = [kind for kind in Kind if self._wishes[kind] > 0]
        if not asked:
            return None
        kind = max(asked)
        mine = self.wish.cause
        return mine if mine is not None and mine.kind is kind else Cause.elsewhere(kind)

    def profile(self) -> bool:
        """Whether the last reduction brought a request for a profile: the same on every rank. As `outcome`, only after
        the device was synchronised."""
        return self._wishes is not None and bool(self._wishes[-1] > 0)

    def now(self) -> Cause | None:
        """Agree at once. A collective that waits: before the first step, not between steps."""
        self.sum([])
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return self.outcome()
