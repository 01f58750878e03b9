"""A copy of the code and the config in the run folder: a job that waits or is requeued runs what was submitted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.errors import UserError
from configs.own import own_files

PACKAGES = ("configs", "models", "trainer", "launch", "slurm")
_ROOT = Path(__file__).resolve().parent.parent.parent
_KEPT = {".py", ".yaml", ".json", ".sbatch"}


def files(own: Sequence[str] = ()) -> dict[Path, Path]:
    """Place in a snapshot -> file, for every file of our packages and of the user's modules in the current folder."""
    ours = (path for package in PACKAGES for path in (_ROOT / package).rglob("*"))
    found = {path.relative_to(_ROOT): path for path in ours if path.suffix in _KEPT and path.is_file()}
    found |= {path.relative_to(Path.cwd()): path for name in own for path in own_files(name)}
    return dict(sorted(found.items()))


def place(folder: Path, configs: Mapping[str, str], own: Sequence[str] = ()) -> Path:
    """The folder of the snapshot of this code and these configs, existing or not. Equal snapshots share a folder."""
    digest = hashlib.sha256(json.dumps(configs).encode())
    for path, source in files(own).items():
        digest.update(f"\0{path}\0".encode())
        digest.update(source.read_bytes())
    return folder / f"snapshot-{digest.hexdigest()[:12]}"


def take(target: Path, configs: Mapping[str, str], with_code: bool, own: Sequence[str] = ()) -> None:
    """Write the snapshot, whole or not at all. Raises UserError when there is no room."""
    if target.exists():
        return
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for name, text in configs.items():
            (partial / name).write_text(text, encoding="utf-8")
        for path, source in files(own).items() if with_code else ():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial / path)
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"run.dir: cannot write to {target.parent}: {error.strerror or error}") from error
