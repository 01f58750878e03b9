"""Settings as nested dicts, by dotted key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def put(settings: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        settings = settings.setdefault(part, {})
    settings[path[-1]] = value


def merged(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    both = {key: merged(theirs[key], ours[key]) for key in theirs.keys() & ours.keys() if isinstance(ours[key], dict)}
    return {**theirs, **ours, **both}
