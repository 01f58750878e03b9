"""A config as plain data: what is written down, what must stay the same between starts, and what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from configs.config import Config
from configs.errors import UserError
from configs.schema.section import Section

_LENGTH = ("train.steps", "train.epochs")


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
    """Dotted key -> value of the fields that change what is learned. An event of its own records a run's length."""
    return {k: v for k, v, changes in fields(config) if changes == "result" and k not in _LENGTH}


def undecided(section: Section, prefix: str = "") -> Iterator[str]:
    """Dotted keys that the config leaves out and the data decide."""
    for name, info in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{info.alias or name}"
        if isinstance(value, Section):
            yield from undecided(value, key + ".")
        elif value is None and isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("from_data"):
            yield key


def decide(config: Config, sizes: dict[str, Any]) -> Config:
    """The config with values for keys that were left out, or the same config if none was. Raises UserError when the
    values do not fit the other keys."""
    if not sizes:
        return config
    data = to_dict(config)
    for key, value in sizes.items():
        *path, last = key.split(".")
        section = data
        for part in path:
            section = section[part]
        section[last] = value
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        told = "; ".join(str(found["msg"]).removeprefix("Value error, ") for found in error.errors())
        raise UserError(f"what the data decide does not fit the config: {told}") from error


def fingerprint(config: Config) -> str:
    """16 hex digits over `result_fields`. They are equal exactly when two configs learn the same thing."""
    text = json.dumps(result_fields(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain data, as written to config.yaml and into checkpoints."""
    return config.model_dump(by_alias=True, mode="json")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ between two `result_fields`, as (key, old value, new value)."""
    keys = sorted(old.keys() | new.keys())
    return [(k, old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)]
