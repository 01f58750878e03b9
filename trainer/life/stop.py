"""The wish to stop: where it comes from, and how it is carried until the ranks have agreed on a step. No torch.

Handlers only note the wish. Nothing collective, and no saving, happens in a signal handler: ranks on either side of a
step boundary would wait for each other for ever.
"""

from __future__ import annotations

import enum
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from trainer.host.clock import now_s
from trainer.host.environment import Job
from trainer.life.folder import write_json
from trainer.life.rows import facts_in, text

_AGENT_PATIENCE_S = 5.0


class Kind(enum.IntEnum):
    """What is asked for. Ranks that ask for different things agree on the highest."""

    REQUEUE = 0  # stop, and be started again
    STOP = 1  # stop, as a person wants
    FAIL = 2  # end as failed: going on makes no sense


class Cause(enum.Enum):
    """Why a run leaves its loop: (word in events and end.json, kind)."""

    TERMINATE = ("terminate", Kind.REQUEUE)
    WARNING = ("warning", Kind.REQUEUE)
    TIME_LIMIT_REQUEUE = ("time_limit", Kind.REQUEUE)
    OTHER_RANK_REQUEUE = ("another_rank", Kind.REQUEUE)
    STOP_FILE = ("stop_file", Kind.STOP)
    INTERRUPT = ("interrupt", Kind.STOP)
    HANGUP = ("hangup", Kind.STOP)
    TIME_LIMIT = ("time_limit", Kind.STOP)
    OTHER_RANK = ("another_rank", Kind.STOP)
    SAVING = ("saving_failed", Kind.FAIL)
    OTHER_RANK_FAIL = ("another_rank", Kind.FAIL)

    @property
    def word(self) -> str:
        return self.value[0]

    @property
    def kind(self) -> Kind:
        return self.value[1]

    @classmethod
    def elsewhere(cls, kind: Kind) -> Cause:
        """The cause to name when only another rank knows it."""
        return {Kind.REQUEUE: cls.OTHER_RANK_REQUEUE, Kind.STOP: cls.OTHER_RANK, Kind.FAIL: cls.OTHER_RANK_FAIL}[kind]


SIGNALS = {
    signal.SIGINT: Cause.INTERRUPT,
    signal.SIGTERM: Cause.TERMINATE,
    signal.SIGUSR2: Cause.WARNING,  # SIGUSR1 belongs to NCCL
    signal.SIGHUP: Cause.HANGUP,
}


class StopRequested(Exception):
    """Leaves a preparation (start-up, data) that no step follows."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause = cause


class StopWish:
    """This process's wish to stop. The first cause stays: a second signal changes nothing.

    `request` is the file in which a launcher passes on the signals that it took.
    """

    def __init__(self, request: Path | None = None) -> None:
        self.cause: Cause | None = None
        self._stop_file: Path | None = None
        self._request = request
        self._at_once = False
        self._limit_s: float | None = None
        self._began = time.monotonic()

    def listen(self) -> None:
        """Take the signals. As early as possible: before this, the launcher's request file keeps what comes."""
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            signal.signal(number, self._note if self._request is None else self._note_launched)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wish(SIGNALS[signal.Signals(number)])
        if self._at_once:
            self._at_once = False  # once: what cleans up now is not interrupted again
            self.raise_if_wished()

    def _note_launched(self, number: int, frame: FrameType | None) -> None:
        """A worker under the launcher: a real wish is in the request file, or will be in a moment.

        Without one, SIGTERM is the agent's: another rank failed and this one shall end, without saving, since that
        rank's shards are gone.
        """
        if number == signal.SIGTERM:
            timer = threading.Timer(_AGENT_PATIENCE_S, self._end_unless_requested)
            timer.daemon = True
            timer.start()

    def _end_unless_requested(self) -> None:
        if self._request is not None and not self._request.exists():
            os._exit(1)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For what is slow and touches nothing: a signal ends it there and then, by StopRequested."""
        self.raise_if_wished()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
        self.raise_if_wished()  # whoever was interrupted may have passed over it

    def wish(self, cause: Cause) -> None:
        if self.cause is None:
            self.cause = cause

    def watch(self, stop_file: Path, limit_s: float | None, began: float) -> None:
        """Rank 0 also looks at the STOP file and the attempt's time limit (`began` by `time.monotonic`)."""
        self._stop_file, self._limit_s, self._began = stop_file, limit_s, began

    def poll(self) -> Cause | None:
        """The wish as of now. It looks at files, so the training loop reads `cause` alone, and a thread polls."""
        if self.cause is not None:
            return self.cause
        if self._stop_file is not None and self._stop_file.exists():
            self.wish(Cause.STOP_FILE)
        elif self._limit_s is not None and time.monotonic() - self._began >= self._limit_s:
            self.wish(Cause.TIME_LIMIT_REQUEUE if Job.read(os.environ).id else Cause.TIME_LIMIT)
        elif self._request is not None and self._request.exists():
            name = text(facts_in(self._request), "cause")
            if name is not None and name in Cause.__members__:
                self.wish(Cause[name])
        return self.cause

    def raise_if_wished(self) -> None:
        """Between the parts of a preparation."""
        cause = self.poll()
        if cause is not None:
            raise StopRequested(cause)


def write_request(path: Path, cause: Cause) -> None:
    """The launcher's side of the request file."""
    write_json(path, {"cause": cause.name, "time_s": now_s()})
