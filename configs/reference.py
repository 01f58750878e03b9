"""Make `configs/schema.json` for editors and `docs/reference.md` for people from the schema.

`python -m configs.reference` (or `make schema`) writes both; a test checks that they are current.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.config import Config
from configs.explain import Kinds, sections_of
from configs.schema.section import MOST_PORT, Section, name_of

ROOT = Path(__file__).resolve().parent.parent
SCHEMA_FILE = ROOT / "configs" / "schema.json"
REFERENCE_FILE = ROOT / "docs" / "reference.md"

_HEAD = """\
# Every key of a config

Made from `configs/schema/` by `make schema`. `result`: the key changes what is learned, so a run folder continues
only under the same value (`run.accept_changes` admits exceptions). `speed`: it changes only speed, memory, or what is
written where. A key without a default must be given; the preset `demo` gives them all. Every number has an upper
bound as well, far above what is meant by anybody; `configs/schema.json` has them.

How values are read, in a file, as `key=value` in a shell, and in the lists of `--array`:

- A value is what YAML 1.2 calls it: `10`, `010` (ten), `.5`, `1e-3`, `true`, `null`, `[a, b]`, `{a: b}`. Nothing else
  is converted: `on`, `1:30`, `1_000` and dates are text, and refused where a number is wanted.
- At a key of text, the text is the value: `12`, `007`; in a shell also `Set #3` and `Q: what`. Only `null`, or nothing
  at all, is no value.
- Quotes around a whole value are taken off; others belong to it.
- In a path `~` is the home of whoever loads the config; what is written into the run folder has it expanded.
"""


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a config file. It requires no key, since a file may include another."""
    schema = Config.model_json_schema(by_alias=True)
    for section in [schema, *schema["$defs"].values()]:
        section.pop("required", None)
        for name, field in section["properties"].items():
            field.pop("title", None)
            changes = field.pop("changes", None)
            if changes and "$ref" not in field and "oneOf" not in field:
                field["description"] = f"{field['description']} (changes the {changes})".replace(
                    "the speed", "speed only"
                )
            if "oneOf" in field:  # part of a section may fit several of them
                field["anyOf"] = field.pop("oneOf")
            section["properties"][name] = field
    texts = {"type": "string"}
    include = {"description": "presets or files, relative to this one, that lie below what this file says"}
    schema["properties"] = {
        "include": {"anyOf": [texts, {"type": "array", "items": texts}], **include},
        **schema["properties"],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Muster config"}


def reference() -> str:
    """A Markdown table per section: key, type, default, what it changes, what it does."""
    parts = [_HEAD]
    for name, info in Config.model_fields.items():
        sections, _ = sections_of(info.annotation)
        parts.append(f"## {name}\n")
        if len(sections) > 1:
            parts.append(_choice(name, sections))
        for section in sections:
            if len(sections) > 1:
                parts.append(f"### {name}: {name_of(section)}\n")
            parts.append(f"{section.__doc__}\n")
            parts.append("| key | type | default | changes | what it is |\n|---|---|---|---|---|")
            parts.extend(f"| {' | '.join(row)} |" for row in _rows(section, name + "."))
            parts.append("")
    return "\n".join(parts)


def _choice(name: str, sections: Kinds) -> str:
    *others, last = (f"`{name_of(section)}`" for section in sections)
    names = f"{', '.join(others)} or {last}"
    return f"`{name}.name` is {names}; {others[0]} where it is not given. Each has keys of its own.\n"


def _rows(section: type[Section], prefix: str) -> Iterator[tuple[str, ...]]:
    schema = section.model_json_schema(by_alias=True)
    for name, info in section.model_fields.items():
        key = prefix + (info.alias or name)
        extra = info.json_schema_extra
        assert isinstance(extra, dict), key
        inner, listed = sections_of(info.annotation)
        default = "" if info.is_required() else f"`{json.dumps(_plain(info.default))}`"
        doc = str(info.description)
        if not inner:
            kind = _kind(schema["properties"][info.alias or name])
            yield f"`{key}`", kind, default, str(extra["changes"]), doc
            continue
        if listed or info.default is None:  # a section whose keys have one default each needs no row
            kind = "list of sections" if listed else "section or null"
            yield f"`{key}`", kind, default, str(extra["changes"]), doc
        for one in inner:
            yield from _rows(one, key + (".*." if listed else "."))


def _plain(value: Any) -> Any:
    return value.model_dump(by_alias=True) if isinstance(value, Section) else value


def _kind(field: dict[str, Any]) -> str:
    """A JSON schema type in words."""
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum") or [field["const"]])
    if field.get("format") == "path":
        return "path"
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
        "object": "mapping of text to text",
    }
    if field["type"] == "array":
        inner = {"whole number": "whole numbers", "number": "numbers"}
        kind = _kind(field["items"])
        return f"list of {inner.get(kind, kind)}" + (f" ({field['minItems']})" if "minItems" in field else "")
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    named = {name: sign for name, sign in limits.items() if name in field and not _is_far(field[name])}
    bounds = " and ".join(f"{sign} {field[name]:g}" for name, sign in named.items())
    return f"{words[field['type']]} {bounds}".strip()


def _is_far(limit: float) -> bool:
    """Whether a limit only excludes values that nobody means: schema.json has it, people need not read it."""
    return limit >= 1000 and limit != MOST_PORT


def contents() -> dict[Path, str]:
    """The files made from the schema."""
    schema = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    return {SCHEMA_FILE: schema, REFERENCE_FILE: reference()}


def main() -> None:
    for path, text in contents().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
