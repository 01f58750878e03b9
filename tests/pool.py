"""A pool of ranks that stays up: calls run one after another on the same processes and process groups.

For tests of many small cases, where starting the ranks for each case would take most of the time. After a call that
fails or hangs, the ranks are replaced, so that one bad case does not spoil the next ones.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.distributed import RanksFailed, _collect, _context, free_port


class Pool:
    """`size` ranks with torchrun's environment. `builds` counts how often they were started."""

    def __init__(self, size: int) -> None:
        self.size, self.builds = size, 0
        self._ranks: dict[Connection, int] = {}
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0) -> list[Any]:
        """Call `function(*arguments)` on every rank; return the results by rank.

        Raises RanksFailed, which names the ranks, when one fails, dies, or does not answer in time.
        """
        if not self._processes:
            self._start()
        try:
            for connection in self._ranks:
                with contextlib.suppress(OSError):  # a rank that died is named below
                    connection.send((function, arguments))
            return _collect(self._ranks, self.size, timeout_s)
        except RanksFailed as failure:
            for process in self._processes:
                process.join(timeout=0.2)
            codes = {rank: process.exitcode for rank, process in enumerate(self._processes) if not process.is_alive()}
            self.close()
            ended = f"\nended by themselves, with exit codes: {codes}" if codes else ""
            raise RanksFailed(f"pool of {self.size}: {failure}{ended}") from failure

    def close(self) -> None:
        """End the ranks, whatever they are doing."""
        for connection in self._ranks:
            connection.close()
        for process in self._processes:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            process.join()
        self._ranks, self._processes = {}, []

    def _start(self) -> None:
        self.builds += 1
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(self.size)}
        shared["LOCAL_WORLD_SIZE"] = str(self.size)
        for rank in range(self.size):
            here, there = _context.Pipe()
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if self.size > 1 else {}
            process = _context.Process(target=_serve, args=(there, env), daemon=True)
            process.start()
            there.close()
            self._ranks[here] = rank
            self._processes.append(process)


def _serve(calls: Connection, env: dict[str, str]) -> None:
    os.environ.update(env, OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            call = calls.recv_bytes()
        except (EOFError, ConnectionResetError):
            os._exit(0)  # the test has ended
        try:
            function, arguments = pickle.loads(call)
            answer: tuple[bool, Any] = (True, function(*arguments))
        except BaseException:  # noqa: BLE001 - the test must see any error
            answer = (False, traceback.format_exc())
        calls.send(answer)
