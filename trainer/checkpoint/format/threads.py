"""Work on files by a few threads: reading, hashing, writing and copying all leave the interpreter to others."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_threads(work: Callable[[T], R], tasks: Sequence[T], threads: int) -> Generator[R, None, None]:
    """The results of all tasks, in their order, a few being worked on at a time; in the calling thread where one is
    enough. Raises the first task's error, once none runs any more. (Whoever may leave the loop early closes it.)"""
    threads = min(threads, len(tasks))
    if threads <= 1:
        yield from map(work, tasks)
        return
    with ThreadPoolExecutor(threads, "muster-files") as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
