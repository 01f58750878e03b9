"""Work on files in a few threads. Reading, hashing, writing and copying release Python's global lock."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_threads(work: Callable[[T], R], tasks: Sequence[T], threads: int) -> Generator[R, None, None]:
    """The results of all tasks, in their order, with a few tasks at work at a time. With one thread or task, the
    calling thread works. Raises the first task's error after all running tasks have ended. (A caller that may leave the
    loop early must close it.)"""
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
