"""How all ranks stop at the same step: their wishes to stop are summed in the reduction that each step makes anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from trainer.life.heartbeat import Phase
from trainer.life.stop import Cause, Kind, StopWish
from trainer.ranks.device import DeviceTime, Reading, from_host
from trainer.ranks.world import World

WISHES = len(Kind) + 1  # one number for each kind of stop, and one for a profile


class Agreed:
    """One reduction, which may still be going on. What it gives to all ranks is fp64, on the device."""

    def __init__(self, world: World, numbers: torch.Tensor) -> None:
        self._world, self._numbers = world, numbers
        self.took = DeviceTime(world.device)  # the device's time for it, waiting for other ranks included
        self._work = world.begin_sum(numbers)
        self.took.end(self._work)

    @property
    def sums(self) -> torch.Tensor:
        """[n]. On the CPU the host waits here for the other ranks; a GPU's queue does."""
        self._wait()
        return self._numbers[:-WISHES]

    @property
    def wishes(self) -> torch.Tensor:
        """[WISHES]: how many ranks ask for each kind of stop; the last counts requests for a profile."""
        self._wait()
        return self._numbers[-WISHES:]

    def scale(self) -> torch.Tensor:
        """1 / the first sum, fp32 0-d."""
        return (1.0 / self.sums[0]).float()

    def _wait(self) -> None:
        if self._work is not None:
            with self._world.heartbeat.during(Phase.COMMUNICATING):
                self._work.wait()
            self._work = None


class Agreement:
    """Sums numbers over the data ranks, and every rank's wish with them.

    The sums stay on the device. The caller copies the wishes to the host later and hands them to `heard`. All ranks do
    so at the same step, with the same numbers, so all stop at the same step. A wish that is in the reduction of step N
    stops the run after step N + 1, or after N where `trainer.loop.must_be_known` holds.
    """

    def __init__(self, world: World, wish: StopWish, asked: Callable[[], bool] = lambda: False) -> None:
        self.world, self.wish, self._asked = world, wish, asked
        self._heard: Sequence[float] = [0.0] * WISHES

    def sum(self, numbers: Sequence[float] = (), on_device: torch.Tensor | None = None) -> Agreed:
        """Begin to sum `on_device`, fp64 [m], and then `numbers` over the data ranks. All ranks must call it."""
        cause, counts = self.wish.cause, self.world.counts
        told = [float(cause is not None and cause.kind is kind) for kind in Kind] + [float(self._asked())]
        # Only the first rank of a tensor group gives numbers, or they would be counted several times. All give wishes.
        both = from_host([*(n if counts else 0.0 for n in numbers), *told], self.world.device)
        if on_device is not None:
            both = torch.cat([on_device if counts else torch.zeros_like(on_device), both])
        return Agreed(self.world, both)

    def heard(self, wishes: Sequence[float]) -> None:
        """Store the wishes of a reduction, which have just been copied to the host."""
        self._heard = wishes

    def outcome(self) -> Cause | None:
        """The cause to stop, from the wishes that were heard last, or None. Its kind is the same on every rank."""
        asked = [kind for kind in Kind if self._heard[kind] > 0]
        if not asked:
            return None
        kind = max(asked)
        mine = self.wish.cause
        return mine if mine is not None and mine.kind is kind else Cause.elsewhere(kind)

    def profile(self) -> bool:
        """Whether any rank asked for a profile, by the wishes that were heard last."""
        return self._heard[-1] > 0

    def now(self) -> Cause | None:
        """Poll, reduce and read at once. It makes the host wait, so it is only for the time before the first step."""
        self.wish.poll()
        self.heard(Reading(self.sum().wishes).values())
        return self.outcome()
