"""A config as plain data: what is written down, what must stay the same, and what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from configs.config import Config
from configs.schema.section import Section


def fields(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every leaf of a config as (dotted key, JSON value, "result" or "speed")."""
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        key = f"{prefix}{info.alias or name}"
        if isinstance(value, Section):
            yield from fields(value, key + ".")
            continue
        extra = info.json_schema_extra
        assert isinstance(extra, dict)
        if isinstance(value, list):
            value = [v.model_dump(by_alias=True) if isinstance(v, Section) else v for v in value]
        yield key, value, str(extra["changes"])


def result_fields(config: Config) -> dict[str, Any]:
    """The fields that change what is learned, by dotted key. `train.steps` is left to an event of its own."""
    return {k: v for k, v, changes in fields(config) if changes == "result" and k != "train.steps"}


def fingerprint(config: Config) -> str:
    """16 hex digits over `result_fields`: equal exactly when two configs learn the same thing."""
    text = json.dumps(result_fields(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_dict(config: Config) -> dict[str, Any]:
    """Plain data, as it is written to config.yaml and into checkpoints."""
    return config.model_dump(by_alias=True, mode="json")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys of two `result_fields` that differ, as (key, old value, new value)."""
    keys = sorted(old.keys() | new.keys())
    return [(k, old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)]
