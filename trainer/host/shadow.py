"""Our packages have common names (`configs`, `models`, `launch`), and people work in folders that hold such names too.

So each program of ours begins with `stand_apart()`, before it imports anything else.
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
    """Finds our packages beside this one, whatever else on Python's path has their names."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [OURS]) if name in PACKAGES else None


def stand_apart() -> None:
    """Import our packages from where this file lies, and nothing at all from the current folder.

    `python -m` looks there first: a `torch.py` or `yaml.py` of the user's would run in place of the library. What of
    theirs is to be imported is asked for by name, with the folder added at the end of `sys.path`.
    """
    sys.path[:] = [place for place in sys.path if not _is_here(place)]
    if _is_here(OURS):
        sys.path.append(OURS)  # the libraries may lie beside us (pip install --target), and nothing else says where
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
    """How a module of ours is started: what lies in the current folder is not run in its place."""
    return [sys.executable] if _is_here(OURS) else [sys.executable, "-P"]  # it may be all that says where ours lie


def apart() -> dict[str, str]:
    """The same as variables, for a program of another's that starts modules of ours (torchrun)."""
    if _is_here(OURS):
        return {}
    from trainer.host.environment import (
        PYTHONPATH,  # not at the top: until our packages stand apart it may not be found
    )

    given = (PYTHONPATH.read(os.environ) or "").split(os.pathsep)
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(place for place in given if not _is_here(place))}


def _is_here(place: str) -> bool:
    try:
        return os.path.realpath(place or ".") == os.getcwd()
    except FileNotFoundError:  # the current folder was removed: nothing is imported from there
        return False
