"""A thread that looks at files for the training loop. No torch.

A look at a shared filesystem may take seconds, or never come back when its server is gone. The loop must not wait for
it: one rank that waits makes all of them wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

EVERY_S = 0.1


class Lookout:
    """Calls `looks` again and again, from now until `close`."""

    def __init__(self, looks: Sequence[Callable[[], object]], say: Callable[[str], None]) -> None:
        self._looks, self._say = looks, say
        self._closed = threading.Event()
        self._said: set[str] = set()
        # A daemon: one that a dead filesystem holds must not keep the process alive.
        threading.Thread(target=self._watch, name="lookout", daemon=True).start()

    def _watch(self) -> None:
        while not self._closed.wait(EVERY_S):
            for look in self._looks:
                try:
                    look()
                except OSError as error:  # a filesystem that answers again later: the run need not end for it
                    self._tell(str(error))

    def _tell(self, problem: str) -> None:
        if problem not in self._said:
            self._said.add(problem)
            self._say(f"cannot look for a wish to stop or for a profile: {problem}; trying again")

    def close(self) -> None:
        """No further look. Does not wait for one that is under way."""
        self._closed.set()
