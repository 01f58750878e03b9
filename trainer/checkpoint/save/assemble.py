"""Rank 0 makes the manifest from what all ranks report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import ValidationError

from trainer.checkpoint.format.boxes import Ints
from trainer.checkpoint.format.collector import no_collection
from trainer.checkpoint.format.errors import SaveError
from trainer.checkpoint.format.files import BLOCK_BYTES
from trainer.checkpoint.format.manifest import Manifest, Source, StoredFile, digest, encode_checksums
from trainer.checkpoint.format.pieces import DTYPE_NAMES, Piece
from trainer.checkpoint.save.share import WrittenFile

# How a shape is cut: the shape, and per piece its file, start (None: a box), elements, offsets and sizes.
_Cut = tuple[Ints, tuple[tuple[int, int | None, int, Ints, Ints], ...]]


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds beside tensors: plain JSON, equal on all ranks.

    `trained_steps` tells, per frozen parameter, the step at which it last changed (0 when absent: never in this run).
    For group "model" it is the step of the save. `stateless` are parameters that train but have no optimizer state yet.
    """

    position: dict[str, Any] = field(default_factory=dict)
    loop: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    step_counts: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)
    stateless: list[str] = field(default_factory=list)
    trained_steps: dict[str, int] = field(default_factory=dict)

    def frozen_copy(self) -> RunState:
        """A copy that later changes of the dicts do not reach. Raises ValueError or TypeError for what is not JSON."""
        return RunState(**json.loads(json.dumps(asdict(self), allow_nan=False)))


@no_collection()
def assemble(
    step: int,
    attempt: int,
    metric: float | None,
    state: RunState,
    files: Sequence[WrittenFile],
    own: Sequence[Piece],
    references: Sequence[tuple[Source, WrittenFile]] = (),
) -> tuple[Manifest, bytes]:
    """The manifest and the text of checksums.json. Raises SaveError when the pieces do not make whole tensors.

    `own` are all of rank 0's pieces, so that a tensor without a single element is known too. `references` are files
    that stay in other checkpoints.
    """
    sources = list(dict.fromkeys(source for source, _ in references))
    stored = [StoredFile(path=file.path, size=file.size, data=file.data) for file in files]
    stored += [
        StoredFile(path=file.path, size=file.size, data=file.data, source=sources.index(source))
        for source, file in references
    ]
    files = [*files, *(file for _, file in references)]
    tensors: dict[str, dict[str, Any]] = {}
    for piece in own:
        _enter(tensors, piece.key, piece.group, DTYPE_NAMES[piece.tensor.dtype], piece.shape)
    for index, file in enumerate(files):
        for written in file.pieces:
            entry = _enter(tensors, written.key, written.group, written.dtype, tuple(written.shape))
            place = (index, written.start, written.numel, tuple(written.offsets), tuple(written.sizes))
            entry["pieces"].append((place, written.byte))
    partitions: dict[_Cut, int] = {}
    described = {key: _describe(key, entry, step, state, partitions) for key, entry in tensors.items()}
    sums = encode_checksums({f.name: file.hashes for f, file in zip(stored, files, strict=True)}, BLOCK_BYTES)
    fields = {
        "step": step,
        "attempt": attempt,
        "saved_s": round(time.time(), 3),
        "metric": metric,
        **{name: value for name, value in asdict(state).items() if name != "trained_steps"},
        "sources": sources,
        "files": stored,
        "partitions": [
            {"shape": list(shape), "pieces": [_place(*place) for place in places]} for shape, places in partitions
        ],
        "tensors": described,
        "checksums": digest(sums),
    }
    try:
        return Manifest.model_validate(fields), sums
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise SaveError(
            f"the pieces do not make a checkpoint: {first['msg']} {_blame(first['loc'], described)}"
        ) from None


def _enter(tensors: dict[str, dict[str, Any]], key: str, group: str, dtype: str, shape: Ints) -> dict[str, Any]:
    entry = tensors.setdefault(key, {"group": group, "dtype": dtype, "shape": shape, "pieces": []})
    if (entry["group"], entry["dtype"], entry["shape"]) != (group, dtype, shape):
        known = f"{entry['group']} {entry['dtype']} {list(entry['shape'])}"
        raise SaveError(f"ranks disagree about {key}: {known} and {group} {dtype} {list(shape)}")
    return entry


def _place(file: int, start: int | None, length: int, offsets: Ints, sizes: Ints) -> dict[str, Any]:
    if start is not None:
        return {"file": file, "start": start, "length": length}
    return {"file": file, "offsets": list(offsets), "sizes": list(sizes)}


def _describe(
    key: str, entry: dict[str, Any], step: int, state: RunState, partitions: dict[_Cut, int]
) -> dict[str, Any]:
    """A tensor's entry in the manifest; its partition is shared with every tensor that is cut alike."""
    cut = (entry["shape"], tuple([place for place, _ in entry["pieces"]]))
    starts = [byte for _, byte in entry["pieces"]]
    trained = {"model": step, "frozen": state.trained_steps.get(key, 0), "optim": None}
    return {
        "group": entry["group"],
        "dtype": entry["dtype"],
        "partition": partitions.setdefault(cut, len(partitions)),
        "bytes": starts[0] if starts and len(set(starts)) == 1 else starts,
        "trained_step": trained[entry["group"]],
    }


def _blame(where: tuple[int | str, ...], described: dict[str, dict[str, Any]]) -> str:
    """The tensors of the partition that a validation error is about."""
    if len(where) >= 2 and where[0] == "partitions":
        return f"({', '.join(sorted(k for k, t in described.items() if t['partition'] == where[1])[:5])})"
    return ""
