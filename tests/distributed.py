"""Ranks for tests: real processes on gloo, started in milliseconds, with hard timeouts, and gone afterwards.

A server process imports torch and the trainer once; every rank is a fork of it. A rank that hangs is killed and named.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import yaml

from tests.machine import patience

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


class RanksFailed(AssertionError):
    """What went wrong on which ranks."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_s: float = 120.0,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """`function(*arguments)` on `size` ranks with torchrun's environment; returns what each gave, by rank.

    Raises RanksFailed with every traceback when one fails, or when the time is over.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    shared |= {"LOCAL_WORLD_SIZE": str(size), **(env or {})}
    connections: dict[Connection, int] = {}
    processes = []
    for rank in range(size):
        here, there = _context.Pipe(duplex=False)
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {**(env or {})}
        process = _context.Process(target=_rank, args=(there, own, function, arguments), daemon=True)
        process.start()
        there.close()
        connections[here] = rank
        processes.append(process)
    try:
        return _collect(connections, size, timeout_s)
    finally:
        for process in processes:
            process.join(timeout=0.0 if process.is_alive() else None)
            if process.is_alive() and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                process.join()


def _collect(connections: dict[Connection, int], size: int, timeout_s: float) -> list[Any]:
    results: list[Any] = [None] * size
    failures: dict[int, str] = {}
    waiting = dict(connections)
    deadline = time.monotonic() + patience(timeout_s)
    while waiting:
        ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise RanksFailed(f"ranks {sorted(waiting.values())} did not answer in {timeout_s} s; so far: {failures}")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                good, value = connection.recv()
            except (EOFError, ConnectionResetError):
                good, value = False, "died"
            if good:
                results[rank] = value
            else:
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + patience(10.0))  # the others only wait for this one
    if failures:
        raise RanksFailed("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())))
    return results


def _rank(there: Connection, env: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(env, OMP_NUM_THREADS="1")
    tempfile.tempdir = None  # the server of the ranks has found one already: TMPDIR is to count
    import torch

    torch.set_num_threads(1)
    try:
        there.send((True, function(*arguments)))
    except BaseException:  # noqa: BLE001 - the test must see whatever it was
        there.send((False, traceback.format_exc()))
    there.close()
    os._exit(0)  # no waiting for threads of a broken process group


# ---- whole runs -----------------------------------------------------------------------------------------------------

TEXTS = 40


def write_corpus(folder: Path, seed: int = 0) -> Path:
    """A few text files with enough words for some hundred samples of 32 tokens."""
    import random

    folder.mkdir(parents=True, exist_ok=True)
    words = [
        "def",
        "class",
        "return",
        "import",
        "self",
        "value",
        "for",
        "in",
        "if",
        "else",
        "while",
        "try",
        "None",
        "True",
        "False",
        "print",
        "data",
        "step",
        "loss",
    ]
    for number in range(TEXTS):
        rng = random.Random(f"{seed}-{number}")
        (folder / f"{number:03d}.txt").write_text(" ".join(rng.choice(words) for _ in range(60)) + "\n")
    return folder


def tiny(folder: Path, **changes: Any) -> dict[str, Any]:
    """A config of a small model over `write_corpus`; `changes` by dotted key with `__` for dots."""
    config: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "log_every_steps": 1, "tensorboard": False},
        "model": {"vocab_size": 260, "dim": 32, "layers": 2, "heads": 2, "mlp_dim": 64, "max_seq_len": 64},
        "data": {
            "seq_len": 32,
            "cache": str(folder / "cache"),
            "sources": [{"name": "words", "path": str(write_corpus(folder / "corpus"))}],
            "validation_fraction": 0.1,
        },
        "train": {"steps": 6, "global_batch": 8, "micro_batch": 4},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "precision": {"compute": "fp32"},
        "checkpoint": {"every_steps": 3},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return config


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny(folder, **changes)))
    return path


def train(config: dict[str, Any], size: int = 1, timeout_s: float = 120.0, debug: bool = False) -> list[int]:
    """A whole run by the trainer's own entry on `size` ranks; the exit code of each."""
    return run_ranks(size, train_here, config, debug, timeout_s=timeout_s)


def train_here(config: dict[str, Any], debug: bool) -> int:
    from configs.config import Config
    from trainer.life.stop import StopWish
    from trainer.start import start

    built = Config.model_validate(config)
    wish = StopWish()
    wish.listen()
    if debug:
        from trainer.debug import debug as run_debug

        return run_debug(built, wish)
    return start(built, wish)


@contextlib.contextmanager
def scratch() -> Any:
    """A folder that is gone afterwards, for those without pytest's tmp_path."""
    folder = Path(tempfile.mkdtemp(prefix="muster-test-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
