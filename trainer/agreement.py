"""One agreed step: every wish to leave travels in a reduction that the step makes anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trainer.life.stop import Cause, Kind, StopWish
from trainer.ranks.device import DeviceTime, Reading, from_host
from trainer.ranks.world import World


@dataclass(frozen=True)
class Agreed:
    """What one reduction brought to all ranks, on the device, fp64. `took`: how long the device waited for it."""

    sums: torch.Tensor  # [n]
    wishes: torch.Tensor  # how many ranks ask for each kind of stop, and last for a profile
    took: DeviceTime


class Agreement:
    """Sums numbers over the data ranks, and carries every rank's wish along.

    All of it stays on the device. Whoever reads the wishes there hands them to `heard`. All ranks read the same
    numbers at the same step, so all leave at the same step.
    """

    def __init__(self, world: World, wish: StopWish, asked: Callable[[], bool] = lambda: False) -> None:
        self.world, self.wish, self._asked = world, wish, asked
        self._heard: Sequence[float] = [0.0] * (len(Kind) + 1)

    def sum(self, numbers: Sequence[float] = (), on_device: torch.Tensor | None = None) -> Agreed:
        """Sums over the data ranks: first of `on_device`, fp64 [m], then of `numbers`. A collective of all ranks."""
        cause, counts = self.wish.cause, self.world.counts
        told = [float(cause is not None and cause.kind is kind) for kind in Kind] + [float(self._asked())]
        # Of a tensor group the first rank alone gives numbers: else they would be counted once for each rank.
        both = from_host([*(n if counts else 0.0 for n in numbers), *told], self.world.device)
        if on_device is not None:
            both = torch.cat([on_device if counts else torch.zeros_like(on_device), both])
        took = DeviceTime(self.world.device)
        self.world.sum(both)
        took.end()
        return Agreed(both[: -len(told)], both[-len(told) :], took)

    def heard(self, wishes: Sequence[float]) -> None:
        """The wishes of a reduction have been read."""
        self._heard = wishes

    def outcome(self) -> Cause | None:
        """What the wishes that were last heard decide: the same kind on every rank."""
        asked = [kind for kind in Kind if self._heard[kind] > 0]
        if not asked:
            return None
        kind = max(asked)
        mine = self.wish.cause
        return mine if mine is not None and mine.kind is kind else Cause.elsewhere(kind)

    def profile(self) -> bool:
        """Whether any rank asked for a profile, in the wishes that were last heard."""
        return self._heard[-1] > 0

    def now(self) -> Cause | None:
        """Agree at once. A collective that waits: before the first step, not between steps."""
        self.wish.poll()
        self.heard(Reading(self.sum().wishes).values())
        return self.outcome()
