"""The presets: configs that lie beside this file. Imports no YAML and no schema, so that shells can ask for them."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def presets() -> list[str]:
    """The names of the presets; a file whose name begins with `_` is only for including."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml") if not p.name.startswith("_"))


def about(name: str) -> str:
    """What a preset is: the comment that its file begins with, after the line for editors."""
    lines = (FOLDER / f"{name}.yaml").read_text("utf-8").splitlines()[1:]
    return " ".join(line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines))
