"""`python -m` puts the current folder first: a `models` or `configs` folder of the user's would be imported as ours."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

OURS = Path(__file__).resolve().parent.parent


def find_shadow() -> str | None:
    """One line that names a folder which shadows a package of ours; None when there is none."""
    for name in ("configs", "models", "trainer"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
        if found != OURS / name:
            where = found or (next(iter(spec.submodule_search_locations or ["?"])) if spec else "nowhere")
            return f"{where} shadows muster's own package {name!r}: start from another folder, or rename it"
    return None


def refuse_shadow() -> None:
    """End with exit code 2 before anything of the wrong package runs. Imports nothing of ours: it may not be ours."""
    line = find_shadow()
    if line is not None:
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2)
