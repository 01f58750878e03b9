"""Which kind of checkpoint a path holds, judged by its files. No torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from configs.errors import UserError
from configs.files import open_regular
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.manifest import FORMAT
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.life.entries import MANIFEST, newest_checkpoint
from trainer.life.folder import RunFolder

Target = Literal["muster", "torch", "dcp"]
Kind = Target | Literal["deepspeed"]
TARGETS: tuple[Target, ...] = ("muster", "torch", "dcp")

METADATA = ".metadata"  # of torch.distributed.checkpoint
ZIP_MAGIC = b"PK\x03\x04"
LATEST = "latest"


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Muster checkpoint. A later format raises UserError, since the checkpoint is not damaged."""
    try:
        return Checkpoint(path)
    except BadCheckpoint as error:
        if error.reason.startswith("format:"):
            raise UserError(f"{path}: not of format {FORMAT}, the only one that this version of Muster reads") from None
        raise


def find_kind(path: Path, kind: Kind | None = None) -> tuple[Kind, Path]:
    """The kind of checkpoint at `path`, and its exact path: of a run folder, its newest one. Raises UserError."""
    try:
        found = _look(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if found is None:
        what = "a folder without a checkpoint" if path.is_dir() else "a file of another kind"
        raise UserError(
            f"{path}: {what}; wanted: a Muster checkpoint or run folder, a file of torch.save, or a folder of "
            "torch.distributed.checkpoint or of DeepSpeed's ZeRO"
        )
    if kind is not None and found[0] != kind:
        raise UserError(f"{path}: --from {kind} was said, but this is {KIND_WORDS[found[0]]}")
    return found


KIND_WORDS: dict[Kind, str] = {
    "muster": "a Muster checkpoint",
    "torch": "a file of torch.save",
    "dcp": "a folder of torch.distributed.checkpoint",
    "deepspeed": "a folder of DeepSpeed's",
}


def _look(path: Path) -> tuple[Kind, Path] | None:
    path.stat()
    if (path / MANIFEST).exists():
        return "muster", path
    other = find_other(path)  # first: DeepSpeed's folders may be named like damaged checkpoints of ours
    if other is not None or not path.is_dir():
        return other
    newest = newest_checkpoint(RunFolder(path).checkpoints) or newest_checkpoint(path)
    return None if newest is None else ("muster", newest)


def find_other(path: Path) -> tuple[Kind, Path] | None:
    """The kind of checkpoint that another program saved at `path`, and its exact path; None if none."""
    if not path.is_dir():
        with open_regular(path) as file:
            return ("torch", path) if file.read(4) == ZIP_MAGIC else None
    names = set(os.listdir(path))
    if METADATA in names:
        return "dcp", path
    found = _find_deepspeed(path, names)
    return None if found is None else ("deepspeed", found)


def _find_deepspeed(path: Path, names: set[str]) -> Path | None:
    """Where the checkpoint is, if a folder with these names is DeepSpeed's or holds some: then the latest."""
    if deepspeed_states(names):
        return path
    if LATEST not in names or not (path / LATEST).is_file():
        return None
    tag = (path / LATEST).read_bytes()[:1000].decode(errors="replace").strip()
    if not re.fullmatch(r"[\w.@=-]+", tag) or tag in (".", ".."):
        raise UserError(f"{path / LATEST}: {tag[:80]!r} is not the name of a folder")
    if not (path / tag).is_dir():
        raise UserError(f"{path / LATEST} names {tag}, and there is no such folder")
    return path / tag if deepspeed_states(set(os.listdir(path / tag))) else None


def deepspeed_states(names: set[str]) -> list[str]:
    """The names that are files as DeepSpeed saves them."""
    return [name for name in names if name.endswith(("model_states.pt", "optim_states.pt"))]
