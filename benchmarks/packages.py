"""Name the packages of pyproject.toml that are not installed. `make gpu`, which uses any Python, asks first.

python benchmarks/packages.py        exit 2 when one is missing that `make gpu` needs
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

UNUSED = {"submitit": "Slurm jobs", "tensorboard": "its series", "deepspeed": "ZeRO", "wandb": "its series"}
TESTS = {"pytest", "pytest-timeout", "hypothesis"}


def names(requirements: list[str]) -> list[str]:
    return [re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in requirements]


def missing() -> tuple[list[str], list[str]]:
    """(missing packages that `make gpu` needs, missing packages that it does without)."""
    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
    every = names(project["dependencies"]) + sorted(TESTS) + ["deepspeed", "wandb"]
    absent = [name for name in every if not _is_here(name)]
    return [name for name in absent if name not in UNUSED], [name for name in absent if name in UNUSED]


def _is_here(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    needed, others = missing()
    if others:
        print("not here, and not needed: " + ", ".join(f"{name} ({UNUSED[name]})" for name in others))
    if needed:
        print(f"missing for this: {', '.join(needed)}; `make test` installs all, or: pip install {' '.join(needed)}")
        sys.exit(2)
