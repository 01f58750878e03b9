"""Ranks meet at the start of a run, in a store at one address. They report whom they wait for, and obey a stop."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from configs.errors import UserError
from trainer.host.environment import LOOPBACK, Ranks
from trainer.life.stop import Cause, StopRequested, StopWish

# Seconds until the missing ranks are named, and a stop ends the waiting. Ranks that meet before that stop inside an
# attempt, which has an end.json.
_FIRST_S = 10.0
_THEN_S = 60.0  # until the missing ranks are named again
_POLL_S = 0.1
_MOST_NAMED = 8
_HEARD_S = 5 * _POLL_S  # until the waiting ranks have heard that rank 0 leaves

Say = Callable[[str], None]


def meet(ranks: Ranks, node: str, agents_store: bool, timeout_s: float, wish: StopWish, say: Say) -> Store:
    """The store, once every rank is in it. `agents_store`: torchrun's agent holds it, not rank 0.

    Raises StopRequested. After `timeout_s` raises TimeoutError, or UserError when the ranks were started by hand.
    """
    assert ranks.meeting is not None
    address, port = where(ranks)
    waiting = _Waiting(ranks, f"{address}:{port}", timeout_s, wish, say)
    hosts = ranks.rank == 0 and not agents_store
    if not hosts:
        waiting.until(lambda: _answers(address, port), lambda: [0])
    timeout = timedelta(seconds=timeout_s)
    store: Store = TCPStore(address, port, None, hosts, timeout, wait_for_workers=False, multi_tenant=hosts)
    here = PrefixStore("here", store)
    here.set(str(ranks.rank), node)
    names = [str(rank) for rank in range(ranks.size)]
    if ranks.rank == 0:
        try:
            waiting.until(lambda: here.check(names), lambda: [int(name) for name in names if not here.check([name])])
        except StopRequested as stop:
            here.set("left", stop.cause.name)
            time.sleep(_HEARD_S)
            raise
        here.set("all", "")
    else:
        # Only rank 0 decides. A rank that decided by itself could leave while rank 0 begins the attempt.
        waiting.hears = lambda: Cause[here.get("left").decode()] if here.check(["left"]) else None
        waiting.until(lambda: here.check(["all"]), lambda: [] if here.check(["0"]) else [0])
    return store


def where(ranks: Ranks) -> tuple[str, int]:
    """Where the ranks meet. On one node never at the name of its host, which may not resolve."""
    assert ranks.meeting is not None
    address, port = ranks.meeting
    own = socket.gethostname()
    if ranks.one_node and (address == own or address.startswith(f"{own}.") or own.startswith(f"{address}.")):
        address = LOOPBACK
    return address, port


def _answers(address: str, port: int) -> bool:
    """Whether something listens there. Not asked by TCPStore: while it waits, this process handles no signal."""
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


class _Waiting:
    """Waits in small steps, and reports for whom."""

    def __init__(self, ranks: Ranks, place: str, timeout_s: float, wish: StopWish, say: Say) -> None:
        self._ranks, self._place, self._timeout_s, self._say = ranks, place, timeout_s, say
        self._began = time.monotonic()
        self._next_s = _FIRST_S
        self._wish = wish
        self.hears: Callable[[], Cause | None] = self._stopped  # why this rank must leave

    def until(self, done: Callable[[], bool], missing: Callable[[], list[int]]) -> None:
        while not done():
            waited_s = time.monotonic() - self._began
            if (cause := self.hears()) is not None:
                raise StopRequested(cause)
            if waited_s > self._timeout_s:
                self._give_up(missing())
            if waited_s > self._next_s:
                self._next_s = waited_s + _THEN_S
                self._tell(missing(), waited_s)
            time.sleep(_POLL_S)

    def _stopped(self) -> Cause | None:
        return self._wish.poll() if time.monotonic() - self._began > _FIRST_S else None

    def _tell(self, missing: list[int], waited_s: float) -> None:
        ranks = self._ranks
        # When ranks wait for rank 0, one rank of each node reports that. Started by hand, each rank reports it.
        if missing and (ranks.rank == 0 or ranks.local_rank == 0 or not ranks.by_torchrun):
            self._say(f"rank {ranks.rank} waits for {_named(missing)} at {self._place} ({waited_s:.0f} s so far)")

    def _give_up(self, missing: list[int]) -> None:
        text = f"{_named(missing or [0])} did not come to {self._place} within {self._timeout_s:g} s"
        if self._ranks.by_torchrun:
            raise TimeoutError(text)  # a failed start, which is started again
        raise UserError(f"{text}: start every rank, or unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE to be alone")


def _named(ranks: list[int]) -> str:
    more = len(ranks) - _MOST_NAMED
    return f"rank{'s' if ranks[1:] else ''} {', '.join(map(str, ranks[:_MOST_NAMED]))}" + (
        f" and {more} more" if more > 0 else ""
    )
