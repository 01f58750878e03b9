"""A file of `torch.save`, as a source and as a target.

`torch.load(path, weights_only=True)` of the target gives {"model": {name: tensor}, "optim": {"state": {name:
{"exp_avg": ..., "step": ...}}, "param_groups": [...]}, "step": n, "muster": JSON text}. Tied tensors stay tied.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launch.checkpoint.convert.archive import Archive, ArchivedContent, ArchiveWriter, Files, NewTensor
from launch.checkpoint.convert.names import is_content, leaves_of, nested, sort_leaves
from launch.checkpoint.convert.state import Content, Range, State, stream, take
from launch.checkpoint.convert.unpickle import ArchivedTensor
from trainer.checkpoint.format import disk
from trainer.checkpoint.load.kinds import ZIP_MAGIC


def read_torch(path: Path, weights_only: bool) -> State:
    """The state in a file of torch.save. Raises UserError when it has none, or more than tensors and plain values."""
    files = Files(path)
    state = State("torch", path, close=files.close)
    head = bytearray(min(4, files.size("")))
    files.read("", 0, memoryview(head))
    if bytes(head) != ZIP_MAGIC:
        raise UserError(
            f"{path}: not a file of torch.save (since PyTorch 1.6 they are zip archives); "
            "an older one: load it where you trust it, and save it again"
        )
    archive = Archive(files, "", 0, files.size(""))
    if not isinstance(archive.root, dict):
        raise UserError(f"{path}: it holds a {type(archive.root).__name__}, not a state dict")
    opened = with_contents(archive, archive.root)
    sort_leaves(state, leaves_of(str(path), opened), weights_only)
    return state


def with_contents(archive: Archive, thing: Any) -> Any:
    """The same structure, with contents in place of tensors."""
    if isinstance(thing, ArchivedTensor):
        return ArchivedContent(archive, thing)
    if isinstance(thing, dict):
        return {key: with_contents(archive, value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return type(thing)(with_contents(archive, value) for value in thing)
    return thing


def write_torch(state: State, file: disk.NewFile, progress: Callable[[int], None] | None) -> None:
    """Fill a new file. All but the file's own name is durable then."""
    contents: list[Content] = []
    numbers: dict[int, int] = {}

    def announce(thing: Any) -> Any:
        if isinstance(thing, dict):
            return {key: announce(value) for key, value in thing.items()}
        if not is_content(thing):
            return thing
        if id(thing) not in numbers:  # A tied tensor is the same content object under each of its names.
            numbers[id(thing)] = len(contents)
            contents.append(thing)
        return NewTensor(numbers[id(thing)], tuple(thing.shape), thing.dtype)

    writer = ArchiveWriter(file.write, announce(nested(state)))
    ranges = [Range.whole(content) for content in contents]
    with stream(ranges, progress) as parts:
        for key, wanted in enumerate(ranges):
            writer.add_parts(f"data/{key}", wanted.nbytes, take(parts, wanted.nbytes))
    writer.finish()
    file.fsync()
