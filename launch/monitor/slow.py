"""The straggler watch and the idle alert: which rank is slower than the others and why, and when all ranks are idle.

Both look at a window of time. A rank's **activity** is the share of the window in which its device worked. For a GPU
this is SM activity by GPM, or GPU utilization without GPM. On a CPU it is the share in which the main thread ran or was
ready to run. A rank that waits for others in a collective is not active.

A rank's **own time** per step is the time it was active, waited for data or saved. All ranks make a step in the same
time, and only the slow rank needs all of that time for itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from trainer.life.heartbeat import Beat, Phase

_BUILDING = (Phase.STARTING, Phase.PREPARING, Phase.COMPILING, Phase.LEAVING)
_OWN = (Phase.WAITING_FOR_DATA, Phase.SAVING)
_HARDWARE_THROTTLES = ("hw_thermal", "hw_power_brake", "hw_slowdown", "sw_thermal")
_UNEXPLAINED = (Phase.COMPUTING, Phase.COMMUNICATING)
_LARGE_PCT = 20.0  # the smallest share of the window that explains slowness


@dataclass(frozen=True)
class RankWindow:
    """One rank over a window. `phases_pct`: shares of the window. Readings of its GPU are means, None without a GPU."""

    rank: int
    node: str
    gpu: str | None
    steps: int
    seconds: float
    phases_pct: dict[str, float]
    activity_pct: float | None
    cpu_wait_pct: float = 0.0
    sm_clock_mhz: float | None = None
    throttled: dict[str, float] = field(default_factory=dict)
    ecc_new: int = 0
    pcie_width: float | None = None
    most_pcie_width: float | None = None

    @property
    def own_s(self) -> float | None:
        """Seconds per step that this rank needed for itself; None when unknown."""
        if not self.steps or self.activity_pct is None:
            return None
        waiting = sum(self.phases_pct.get(phase.word, 0.0) for phase in _OWN)
        return min(waiting + self.activity_pct, 100.0) / 100 * self.seconds / self.steps


def seconds_of(beat: Beat, now: float) -> list[float]:
    """Seconds that the rank's process has spent in each phase, up to `now`."""
    total = list(beat.seconds)
    total[beat.phase] += max(now - beat.since_s, 0.0)
    return total


def rank_window(before: tuple[Beat, float], after: tuple[Beat, float], node: str, rolled: dict[str, Any]) -> RankWindow:
    """A rank between two heartbeats. `rolled["rank"]` and `["gpu"]` are the rollups of its row and of its GPU's."""
    (first, began), (last, ended) = before, after
    spent = [b - a for a, b in zip(seconds_of(first, began), seconds_of(last, ended), strict=True)]
    seconds = ended - began
    rank, gpu = rolled["rank"], rolled["gpu"] or {}
    mean = lambda values, name: values[name][0] if name in values else None  # noqa: E731
    if rolled["gpu"] is None:
        cpu, ready = mean(rank, "main_cpu_pct"), mean(rank, "cpu_wait_pct")
        activity = None if cpu is None or ready is None else min(cpu + ready, 100.0)
    else:
        activity = mean(gpu, "sm_pct") if "sm_pct" in gpu else mean(gpu, "gpu_pct")
    ecc = [gpu[name] for name in ("ecc_corrected", "ecc_uncorrected") if name in gpu]
    return RankWindow(
        rank=last.rank,
        node=node,
        gpu=gpu.get("uuid"),
        steps=last.step - first.step,
        seconds=seconds,
        phases_pct={phase.word: round(100 * spent[phase] / seconds, 1) for phase in Phase if spent[phase] > 0},
        activity_pct=activity,
        cpu_wait_pct=mean(rank, "cpu_wait_pct") or 0.0,
        sm_clock_mhz=mean(gpu, "sm_clock_mhz"),
        throttled=gpu.get("throttled", {}),
        ecc_new=int(sum(high - low for _, low, high in ecc)),
        pcie_width=mean(gpu, "pcie_width"),
        most_pcie_width=mean(gpu, "most_pcie_width"),
    )


def is_training(window: RankWindow) -> bool:
    """Whether the whole window was spent in steps, not in building or leaving."""
    return not any(phase.word in window.phases_pct for phase in _BUILDING)


def stragglers(ranks: list[RankWindow], share: float) -> list[tuple[RankWindow, float, str | None]]:
    """(rank, its own time / the median, why) of each rank that is slower than the median by `share`."""
    known = [(rank, own) for rank in ranks if (own := rank.own_s) is not None]
    if len(known) < 2:
        return []
    found = []
    for rank, own in known:
        others = median(o for r, o in known if r is not rank)
        if others > 0 and own > (1 + share) * others:
            found.append((rank, own / others, why_slow(rank, [r for r, _ in known if r is not rank])))
    return found


def why_slow(rank: RankWindow, others: list[RankWindow]) -> str | None:
    """What distinguishes a slow rank from the others, if anything known here does."""
    usual = lambda value: median(value(other) for other in others)  # noqa: E731
    for phase, words in ((Phase.WAITING_FOR_DATA, "it waits for data"), (Phase.SAVING, "it waits for saves")):
        mine, theirs = rank.phases_pct.get(phase.word, 0.0), usual(lambda r, p=phase: r.phases_pct.get(p.word, 0.0))
        if mine > theirs + _LARGE_PCT / 2:
            return f"{words} {mine:.0f} % of the time"
    throttles = [word for word in _HARDWARE_THROTTLES if rank.throttled.get(word, 0.0) > 0]
    clocks = [other.sm_clock_mhz for other in others if other.sm_clock_mhz is not None]
    if rank.sm_clock_mhz is not None and (throttles or (clocks and rank.sm_clock_mhz < 0.9 * median(clocks))):
        reasons = ", ".join(throttles or sorted(rank.throttled)) or "no reason given"
        return f"its clock is held at {rank.sm_clock_mhz:.0f} MHz ({reasons})"
    if rank.ecc_new > 0:
        return f"{rank.ecc_new} new ECC errors"
    if rank.pcie_width is not None and rank.most_pcie_width is not None and rank.pcie_width < rank.most_pcie_width:
        return f"its PCIe link has {rank.pcie_width:.0f} of {rank.most_pcie_width:.0f} lanes"
    if rank.cpu_wait_pct > usual(lambda r: r.cpu_wait_pct) + _LARGE_PCT / 2:
        return f"its CPU is taken: {rank.cpu_wait_pct:.0f} % of the time it could have run and had none"
    return None


def idle(ranks: list[RankWindow], below_pct: float) -> tuple[float, str] | None:
    """(mean activity, why) when the activity is below the bound; None when it is not, or unknown."""
    known = [rank.activity_pct for rank in ranks if rank.activity_pct is not None]
    if not known or (activity := sum(known) / len(known)) >= below_pct:
        return None
    shares = {p: sum(r.phases_pct.get(p.word, 0.0) for r in ranks) / len(ranks) for p in Phase}
    for phase, words in (
        (Phase.WAITING_FOR_DATA, "the ranks wait for data {:.0f} % of the time: the reader is too slow"),
        (Phase.SAVING, "the ranks wait for saves {:.0f} % of the time: checkpoint.every_steps is small"),
        (Phase.VALIDATING, "the ranks validate {:.0f} % of the time: train.validate_every_steps is small"),
    ):
        if shares[phase] > _LARGE_PCT and shares[phase] == max(s for p, s in shares.items() if p not in _UNEXPLAINED):
            return activity, words.format(shares[phase])
    return activity, "the ranks mostly wait for each other: a step is too small (train.micro_batch, train.global_batch)"
