"""Folders that exist as long as their process. A later start removes the folders of killed processes. No torch.

The cache has folders of another kind (`temporary_folder` in `data/files.py`). Several users and nodes share them, a
rename publishes them, and age decides where a filesystem has no locks. Each of these would do harm here.
"""

from __future__ import annotations

import glob
import os
import shutil
import stat
import tempfile
from pathlib import Path
from types import TracebackType

from configs.errors import UserError
from trainer.host.locks import lock
from trainer.host.node_name import node_name


class HeldFolder:
    """A folder in `parent` that belongs to this process, with a file in it that is locked while the process lives.

    A pid would not do: another container has other pids, and pids are reused. The folder's name holds this node's name:
    on a disk that several nodes share, a lock may be visible on its own node only.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        held = None
        while held is None:  # another start may remove the folder as left over before it is locked
            self.path = Path(tempfile.mkdtemp(prefix=f"{prefix}{node_name()}-", dir=parent))
            held = _lock(self.path, own=True)
        self._lock = held

    @classmethod
    def temporary(cls, prefix: str) -> HeldFolder:
        """A folder among the machine's temporary files. First removes what killed processes left there. Raises
        UserError when none can be made."""
        try:
            parent = Path(tempfile.gettempdir())
            remove_left(parent, prefix)
            return cls(parent, prefix)
        except OSError as error:
            raise UserError(f"no temporary folder can be made ({error}): free some space, or set TMPDIR") from error

    def remove(self) -> None:
        """Remove the folder and all in it. It is unlocked in any case, so that a later start removes what remains.
        Raises no error, which would hide how the run ended."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


def remove_left(parent: Path, prefix: str) -> None:
    """Remove the folders of this user's dead processes on this node."""
    for left in parent.glob(glob.escape(f"{prefix}{node_name()}-") + "*"):
        if _is_own(left) and (held := _lock(left, own=False)) is not None:
            shutil.rmtree(left, ignore_errors=True)  # another start may be removing it too
            os.close(held)


def _is_own(folder: Path) -> bool:
    """Whether this is a real folder of our own user. Anybody may put a link into /tmp, and root would follow it."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _lock(folder: Path, own: bool) -> int | None:
    """The lock of a folder; None when a process holds it, or has removed the folder. Without locks in the filesystem,
    also None for another's folder: nobody can tell whether its maker lives."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        if (lock(descriptor) or own) and os.fstat(descriptor).st_nlink:
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None
