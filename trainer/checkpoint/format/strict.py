"""JSON in every file of a checkpoint: an object never has the same key twice. No torch."""

from __future__ import annotations

import json
from typing import Any


def parse(text: bytes) -> Any:
    """Raise ValueError for text that is no JSON, or has a key twice: readers would disagree which value counts."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_no_twins)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in found if keys.count(key) > 1)!r} stands twice")
    return found
