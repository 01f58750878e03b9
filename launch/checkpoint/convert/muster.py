"""A checkpoint of format 1 as a target: whole tensors in files of a bounded size, and a manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from configs.errors import UserError
from launch.checkpoint.convert.state import STORAGE_FIELDS, Range, State, StateTensor, stream, take
from trainer.checkpoint.format import disk
from trainer.checkpoint.format.boxes import GROUPS, Group, Ints
from trainer.checkpoint.format.files import BLOCK_BYTES
from trainer.checkpoint.format.manifest import CHECKSUMS, Manifest, digest, encode_checksums
from trainer.checkpoint.format.pieces import DTYPE_NAMES, Piece
from trainer.checkpoint.format.writing import FileLayout, write_bytes, write_file
from trainer.life.entries import MANIFEST

FILE_LIMIT_BYTES = 4 << 30


def write_muster(state: State, folder: Path, progress: Callable[[int], None] | None) -> None:
    """Fill an empty folder. All but the folder's own name is durable then."""
    planned = [(group, name, layout) for group in GROUPS for name, layout in _files(state, group)]
    ranges = (Range.whole(state.tensors[piece.key].content) for _, _, layout in planned for piece in layout.pieces)
    hashes: dict[str, str] = {}
    with stream(ranges, progress) as parts:
        for group in GROUPS:
            disk.mkdir(str(folder / group))
            for owner, name, layout in planned:
                if owner == group:
                    hashes[name] = write_file(str(folder / name), layout, take(parts, layout.data_bytes))
            disk.fsync_dir(str(folder / group))
    sums = encode_checksums(hashes, BLOCK_BYTES)
    manifest = _manifest(state, [(name, layout) for _, name, layout in planned], digest(sums))
    write_bytes(str(folder / CHECKSUMS), sums)
    write_bytes(str(folder / MANIFEST), manifest.encode())
    disk.fsync_dir(str(folder))


def _files(state: State, group: Group) -> Iterator[tuple[str, FileLayout]]:
    """(name, layout) of each file of a group of tensors."""
    pieces: list[Piece] = []
    size = count = 0
    for key, tensor in state.tensors.items():
        if tensor.group != group or not tensor.numel:
            continue
        if pieces and size + tensor.nbytes > FILE_LIMIT_BYTES:
            yield f"{group}/rank-00000-{count:03d}.safetensors", FileLayout.of(pieces)
            pieces, size, count = [], 0, count + 1
        pieces.append(_piece(key, tensor))
        size += tensor.nbytes
    if pieces:
        yield f"{group}/rank-00000-{count:03d}.safetensors", FileLayout.of(pieces)


def _piece(key: str, tensor: StateTensor) -> Piece:
    shape = tuple(tensor.content.shape)
    announced = torch.empty(shape, dtype=tensor.content.dtype, device="meta")
    return Piece(key, tensor.group, announced, shape, (0,) * len(shape), shape)


def _manifest(state: State, files: list[tuple[str, FileLayout]], checksums: str) -> Manifest:
    places = {
        piece.key: (index, len(layout.header) + start)
        for index, (_, layout) in enumerate(files)
        for piece, start in zip(layout.pieces, layout.starts, strict=True)
    }
    partitions: dict[tuple[Ints, int | None], int] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for key, tensor in state.tensors.items():
        shape = tuple(tensor.content.shape)
        file, byte = places.get(key, (None, None))
        trained = {"model": state.step, "frozen": 0, "optim": None}[tensor.group]
        tensors[key] = {
            "group": tensor.group,
            "dtype": DTYPE_NAMES[tensor.content.dtype],
            "partition": partitions.setdefault((shape, file), len(partitions)),
            "bytes": [] if byte is None else byte,
            "trained_step": trained if tensor.group == "optim" else state.trained_steps.get(key, trained),
        }
    fields = {
        **_facts(state),
        "step_counts": state.step_counts,
        "aliases": state.aliases,
        "files": [{"path": name, "size": layout.size, "data": len(layout.header)} for name, layout in files],
        "partitions": [
            {
                "shape": list(shape),
                "pieces": [] if file is None else [{"file": file, "offsets": [0] * len(shape), "sizes": list(shape)}],
            }
            for shape, file in partitions
        ],
        "tensors": tensors,
        "checksums": checksums,
    }
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{state.path}: makes no checkpoint: {where}: {first['msg']}") from None


def _facts(state: State) -> dict[str, Any]:
    """The manifest's fields as far as the source knew them. For another kind of source: the plain values it held."""
    known = {k: v for k, v in state.facts.items() if k in Manifest.model_fields and k not in STORAGE_FIELDS}
    known.setdefault("step", 0)
    known.setdefault("loop", {"step": known["step"]})  # the step where a run that takes the whole state goes on
    known.setdefault("saved_s", round(time.time(), 3))
    if "config" not in known:
        known["config"] = {"converted_from": {"kind": state.kind, "path": str(state.path), "values": state.values}}
    for field in ("buffers", "stateless"):
        if field in known:
            known[field] = [name for name in known[field] if name in state.tensors]
    return known
