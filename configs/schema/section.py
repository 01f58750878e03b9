"""What a section of the config is, and the two kinds of fields in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field
from pydantic.fields import FieldInfo

# Far above what anybody means. Above these limits, clocks, C++ and memory fail with errors that name no key.
MOST_STEPS = 10**9
MOST_TOKENS = 10**9  # per sequence
MOST_WORDS = 2**31 - 1  # rows of an embedding: ids are kept in 32 bits
MILLION = 10**6
MOST_TIMES = 10**9  # people write such a number, here and in seconds, for "for ever"
MOST_S = 10**9
MOST_PORT = 65535


def result(default: Any = ..., doc: str = "", **constraints: Any) -> Any:
    """A field that changes the numbers a run produces; part of the fingerprint."""
    return Field(default, description=doc, json_schema_extra={"changes": "result"}, **constraints)


def speed(default: Any = ..., doc: str = "", **constraints: Any) -> Any:
    """A field that changes only speed, memory, or what is written where."""
    return Field(default, description=doc, json_schema_extra={"changes": "speed"}, **constraints)


def from_data(doc: str, **constraints: Any) -> Any:
    """A field of `result` that the data decide when the config leaves it out. It is None until then."""
    told = f"{doc}; from the data when left out"
    return Field(None, description=told, json_schema_extra={"changes": "result", "from_data": True}, **constraints)


class Section(BaseModel):
    """Unknown keys are refused, values are never converted to another type, and a built config cannot change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)


def is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def keys(*sections: type[Section]) -> dict[str, FieldInfo]:
    """The fields of sections under their names in a file. Of two fields with one name, the first section's is taken."""
    found: dict[str, FieldInfo] = {}
    for section in sections:
        for name, info in section.model_fields.items():
            found.setdefault(info.alias or name, info)
    return found


OWN = "own"  # the tag of a section whose `name` is the user's own: `module:name`


def by_name(default: str) -> Discriminator:
    """Chooses among several sections, each tagged with the one value of its `name`; `default` if none is given."""

    def chosen(given: Any) -> str:
        name = given.get("name", default) if isinstance(given, dict) else getattr(given, "name", default)
        if isinstance(name, str):
            return OWN if ":" in name else name
        return repr(name)  # no section has this name

    return Discriminator(chosen)


def name_of(section: type[Section]) -> str:
    """The value of `name` that chooses this section."""
    names = get_args(section.model_fields["name"].annotation)
    return str(names[0]) if names else OWN


def named(sections: Sequence[type[Section]], name: Any) -> tuple[type[Section], ...]:
    """The section of this name (the first where `name` is None); all sections when none has it."""
    if len(sections) < 2:
        return tuple(sections)
    if name is None:
        return (sections[0],)
    tag = OWN if ":" in str(name) else name
    return tuple(s for s in sections if name_of(s) == tag) or tuple(sections)
