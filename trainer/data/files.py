"""Files of the cache: streamed arrays, and folders and JSON that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trainer.host.locks import lock

_HEADER_BYTES = 128
_TEMPORARY = ".tmp-"
_LOCK = "lock"
_STALE_S = 24 * 3600.0


class ArrayWriter:
    """A .npy file of unknown length, written in chunks; `close` writes the length into its header. `item`: the shape of
    one counted item, where an item is more than one number."""

    def __init__(self, path: Path, dtype: np.dtype, item: tuple[int, ...] = ()) -> None:
        self.dtype = dtype.newbyteorder("<")
        self.item = item
        self.count = 0
        self._file: BinaryIO = path.open("wb", buffering=1 << 20)
        self._file.write(self._header())

    def add(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.count += len(values)

    def close(self) -> None:
        """Make the file whole and durable."""
        self._file.seek(0)
        self._file.write(self._header())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        # On a full disk this flush fails again. The file is removed anyway, so nobody needs the error.
        with contextlib.suppress(OSError):
            self._file.close()

    def _header(self) -> bytes:
        shape = (self.count, *self.item)
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
        body = text.ljust(_HEADER_BYTES - 11).encode() + b"\n"
        return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def map_array(path: Path) -> np.ndarray:
    """Memory-map a .npy file. An empty file cannot be mapped, so it is read."""
    array = np.load(path, allow_pickle=False) if path.stat().st_size <= _HEADER_BYTES else np.load(path, mmap_mode="r")
    return array.view(np.ndarray)  # slicing an np.memmap costs several microseconds more


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically and durably."""
    name = _temporary_name(path.parent)
    try:
        with name.open("x") as file:
            json.dump(value, file, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            name.unlink()
        raise
    sync_folder(path.parent)


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def temporary_folder(cache: Path) -> Iterator[Path]:
    """A new folder in the cache, removed at the end unless `publish` renamed it. It is locked while its maker lives.

    This is no `HeldFolder` (`trainer/host/held.py`): that one is private, and only its own user on its own node removes
    it.
    """
    folder = _temporary_name(cache)
    folder.mkdir()
    # The lock gets its name only once it is held: nobody can find it free while its maker lives.
    fd = os.open(folder / "new-lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        with contextlib.suppress(OSError):  # without locks, `remove_leftovers` decides by age
            if lock(fd):
                os.rename(folder / "new-lock", folder / _LOCK)
        yield folder
    finally:
        os.close(fd)
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, final: Path) -> bool:
    """Rename a finished temporary folder to its name. False if an equal folder has that name: then that one stays."""
    for name in (_LOCK, "new-lock"):
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
    try:
        os.rename(folder, final)
    except OSError:
        if not final.is_dir():
            raise
        return False
    sync_folder(final.parent)
    return True


def remove_leftovers(cache: Path) -> None:
    """Remove temporary files and folders of dead makers: their lock is free, or for a day they had none."""
    for path in cache.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            # Where there is a lock, it alone decides. By age, a new folder could look old because the clock was set.
            if path.is_dir() and (_lock_is_free(path / _LOCK) if (path / _LOCK).exists() else _age_s(path) > _STALE_S):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_file() and _age_s(path) > _STALE_S:
                path.unlink()


def _lock_is_free(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return False  # removed meanwhile, or not ours to open
    try:
        return lock(fd)
    except OSError:
        return False
    finally:
        os.close(fd)


def _age_s(path: Path) -> float:
    inside = list(path.iterdir()) if path.is_dir() else []
    return time.time() - max(p.stat().st_mtime for p in [path, *inside])


def _temporary_name(folder: Path) -> Path:
    """A name that nobody else has. (tempfile makes private files, but a cache is shared.)"""
    return folder / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
