"""Old checkpoints are deleted by a thread of their own: terabytes take minutes, and no save waits for that."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint.format import disk

_SILENCE_S = 1.0


class Removal:
    """Deletes folders one at a time. Each has a name that the next start clears, should this process be cut short."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._newest: threading.Thread | None = None

    def begin(self, folder: str) -> None:
        """Delete a folder as soon as those before it are gone."""
        arguments = (folder, self._newest)
        self._newest = threading.Thread(target=self._remove, args=arguments, name="muster-remover", daemon=True)
        self._newest.start()

    def _remove(self, folder: str, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        try:
            disk.remove_tree(folder)
        except OSError as error:
            self._say(f"{folder} stays until the next start: {error}")

    def beside(self, root: Path, needed_bytes: int) -> bool:
        """Whether something is still being deleted while a save of so many bytes begins. Where there is no room for
        both, this waits: a disk that is full for a moment also ends whoever else writes there."""
        if self._busy() and shutil.disk_usage(root).free < needed_bytes:
            self.wait()
        return self._busy()

    def _busy(self) -> bool:
        return self._newest is not None and self._newest.is_alive()

    def wait(self) -> None:
        """Return once nothing is left to delete."""
        if self._newest is not None:
            self._newest.join()

    def end(self) -> None:
        """As `wait`, when the run is over. What takes long is said, as nothing else is heard then."""
        if self._newest is not None:
            self._newest.join(_SILENCE_S)
        if self._busy():
            self._say("old checkpoints are being deleted; what is cut short now goes with the next start")
            self.wait()
