"""The pool of ranks that other tests use: it stays up, names what went wrong, and works again afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.distributed import RanksFailed
from tests.pool import Pool


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(2)
    yield made
    made.close()


def whoami() -> tuple[int, int]:
    return int(os.environ["RANK"]), os.getpid()


def fail(rank: int, how: str) -> None:
    if int(os.environ["RANK"]) != rank:
        return
    if how == "raise":
        raise ValueError("as asked")
    if how == "die":
        os._exit(3)
    time.sleep(60)


def test_ranks_stay(pool: Pool) -> None:
    first = pool.run(whoami)
    assert [rank for rank, _ in first] == [0, 1]
    assert pool.run(whoami) == first
    assert pool.builds == 1


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", "pool of 2: rank 1:.*as asked"),
        ("die", "rank 1:\ndied\nended by themselves, with exit codes: {1: 3}"),
        ("hang", r"ranks \[1\] did not answer in 2"),
    ],
)
def test_failure_is_named_and_the_pool_is_made_anew(how: str, words: str, pool: Pool) -> None:
    before = pool.run(whoami)
    with pytest.raises(RanksFailed, match=f"(?s){words}"):
        pool.run(fail, 1, how, timeout_s=2.0)
    after = pool.run(whoami)
    assert [rank for rank, _ in after] == [0, 1]
    assert not {pid for _, pid in before} & {pid for _, pid in after}
    assert pool.builds == 2
