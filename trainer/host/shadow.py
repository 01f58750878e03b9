"""Keep our packages apart from files of the same names. They have common names (`configs`, `models`, `launch`), and
people work in folders that hold such names too.

So each program of ours calls `stand_apart()` before it imports anything else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PACKAGES = ("configs", "models", "trainer", "launch", "slurm", "muster")
OURS = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))


class _Ours:
    """Finds our packages beside this file, whatever else on Python's path has their names."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [OURS]) if name in PACKAGES else None


def stand_apart() -> None:
    """Import our packages from the folder of this file, and import nothing from the current folder.

    `python -m` looks in the current folder first: a user's `torch.py` or `yaml.py` would run in place of the library.
    Where a user's module is wanted, it is imported by name, with the folder added at the end of `sys.path`.
    """
    sys.path[:] = [place for place in sys.path if not _is_here(place)]
    if _is_here(OURS):
        sys.path.append(OURS)  # the libraries may lie beside us (pip install --target): nothing else names that folder
    sys.meta_path.insert(0, _Ours)
    try:
        import configs.errors  # noqa: F401
    except ImportError as error:  # pip lets two packages write the same file
        sys.stderr.write(
            f"error: {OURS}/configs is not Muster's alone ({error}): another installed package has that name.\n"
            "Install Muster in an environment of its own: python -m venv NAME, then NAME/bin/pip install what it was\n"
        )
        raise SystemExit(2) from None


def python() -> list[str]:
    """The command that starts one of our modules, so that no file in the current folder runs in its place."""
    return [sys.executable] if _is_here(OURS) else [sys.executable, "-P"]  # else ours may not be found


def apart() -> dict[str, str]:
    """The same as environment variables, for another program that starts modules of ours (torchrun)."""
    if _is_here(OURS):
        return {}
    from trainer.host.environment import (
        PYTHONPATH,  # not at the top: before our packages stand apart it may not be found
    )

    given = (PYTHONPATH.read(os.environ) or "").split(os.pathsep)
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(place for place in given if not _is_here(place))}


def _is_here(place: str) -> bool:
    try:
        return os.path.realpath(place or ".") == os.getcwd()
    except FileNotFoundError:  # the current folder was removed, so nothing is imported from it
        return False
