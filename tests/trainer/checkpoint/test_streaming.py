"""Frozen tensors streamed through two buffers. The stand-in for a GPU copies real tensors, at once or late."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_store import save, whole

from trainer.checkpoint.format import disk
from trainer.checkpoint.format.pieces import DTYPES
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save import store as store_module
from trainer.checkpoint.save import streaming
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore
from trainer.checkpoint.save.streaming import host_blocks


class Copying:
    """Copies into a buffer at once, or (`late`) spoils it and copies when that is waited for: a GPU may do either. So
    whoever reads too early finds spoilt bytes, and whoever begins a copy into what is not written yet finds those of
    another block. `seen`: what happened, in order."""

    def __init__(self, late: bool) -> None:
        self._late = late
        self.seen: list[str] = []
        self.buffers: list[torch.Tensor] = []

    def flat(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    def buffer(self) -> torch.Tensor:
        self.buffers.append(torch.full((streaming.BLOCK_BYTES,), 0xEE, dtype=torch.uint8))
        return self.buffers[-1]

    def begin(self, part: torch.Tensor, held: torch.Tensor) -> Callable[[], None]:
        self.seen.append("begin")
        if not self._late:
            held.copy_(part)
            return lambda: None
        held.fill_(0xEE)

        def end() -> None:
            held.copy_(part)

        return end


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 64)


names = st.sampled_from(sorted(set(DTYPES) - {"BOOL"}))


@given(
    late=st.booleans(),
    tensors=st.lists(st.tuples(st.integers(0, 100), names), max_size=6),
    block_bytes=st.sampled_from([8, 24, 64, 512]),
)
def test_the_bytes_are_those_of_the_tensors(late: bool, tensors: list[tuple[int, str]], block_bytes: int) -> None:
    """Whatever the sizes, blocks and number formats, contiguous or not."""
    random = torch.Generator().manual_seed(len(tensors) + block_bytes)
    made = []
    for count, name in tensors:
        content = torch.randint(0, 256, (16 * count,), dtype=torch.uint8, generator=random).view(DTYPES[name])
        made.append(content.reshape(count, -1).t() if count % 2 else content)
    found, copies = bytearray(), Copying(late)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BLOCK_BYTES", block_bytes)
        for view in host_blocks(made, copies):
            assert len(view) <= block_bytes
            found += view
    assert bytes(found) == b"".join(bytes(view) for view in host_blocks(made, None))
    assert len(copies.buffers) == 2


def test_the_next_block_is_copied_while_one_is_written_and_no_further(small_blocks: None) -> None:
    copies = Copying(late=True)
    for _ in host_blocks([torch.arange(40.0), torch.arange(10.0)], copies):  # blocks of 64, 64, 32 and 40 bytes
        copies.seen.append("written")
    assert copies.seen == ["begin", "begin", "written", "begin", "written", "begin", "written", "written"]


def test_host_tensors_are_given_as_they_are() -> None:
    tensor = torch.arange(100.0)
    (view,) = host_blocks([tensor], None)
    tensor[0] = 7.0
    assert memoryview(view).cast("f")[0] == 7.0


@pytest.mark.parametrize("late", [False, True])
def test_a_save_streams_what_is_frozen(
    tmp_path: Path, late: bool, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    """Checksums are of the right bytes, also over files that are written at the same time."""
    monkeypatch.setattr("trainer.checkpoint.save.share.FILE_BYTES", 1000)
    made: list[Copying] = []

    def copies_from(tensors: Iterator[torch.Tensor]) -> Copying:
        assert len(list(tensors)) == 8
        made.append(Copying(late))
        return made[-1]

    monkeypatch.setattr(store_module, "copies_from", copies_from)
    store = CheckpointStore(tmp_path / "checkpoints")
    frozen = {f"f{n}": torch.randn(30, n + 1, generator=torch.Generator().manual_seed(n)).t() for n in range(8)}
    pieces = [whole("w", "model", torch.ones(3)), *(whole(key, "frozen", tensor) for key, tensor in frozen.items())]
    store.save(1, pieces, RunState())
    assert [result.error for result in store.wait()] == [None]
    checkpoint = Checkpoint(store.shelf.path(1))
    checkpoint.verify()
    for key, tensor in frozen.items():
        assert torch.equal(checkpoint.read(key), tensor)
    files = list((store.shelf.path(1) / "frozen").iterdir())
    assert len(files) > 3
    assert len(made[0].buffers) == 2 * len(files)


def test_a_disk_that_is_full_in_between_fails_the_save_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    monkeypatch.setattr(store_module, "copies_from", lambda tensors: Copying(late=True))

    @contextmanager
    def observe(operation: disk.Operation) -> Iterator[None]:
        if operation.name == "write" and "/frozen/" in operation.path and operation.offset > 300:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), operation.path)
        yield

    store = CheckpointStore(tmp_path / "checkpoints")
    disk.observer = observe
    try:
        assert "No space left" in str(save(store, 1).error)
    finally:
        disk.observer = None
    assert save(store, 2).ok
    Checkpoint(store.shelf.path(2)).verify()
