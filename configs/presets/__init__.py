"""The presets: configs that lie beside this file. Imports no YAML and no schema, so that shells can ask quickly."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def presets() -> list[str]:
    """The names of the presets. A file whose name begins with `_` is no preset: other files include it."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml") if not p.name.startswith("_"))


def about(name: str) -> str:
    """What a preset is: the comment at the start of its file, after the line for editors."""
    lines = (FOLDER / f"{name}.yaml").read_text("utf-8").splitlines()[1:]
    return " ".join(line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines))
