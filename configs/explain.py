"""What is wrong with a config, in plain words: unknown keys with the nearest valid key, and pydantic's findings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from configs.config import Config
from configs.parse import Node, Place, Problem, index_of
from configs.schema.section import Section, is_section, keys, name_of, named
from configs.typed import options_of

UNITS = {
    "s": "seconds",
    "tokens": "tokens",
    "steps": "steps",
    "samples": "samples",
    "blocks": "blocks",
    "bytes": "bytes",
    "gib": "GiB",
}
SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}

# Names of other trainers, where no similar spelling leads to our key.
ELSEWHERE = {
    "batch_size": "train.global_batch",
    "context_length": "data.seq_len",
    "dtype": "precision.compute",
    "grad_clip": "train.clip_norm",
    "gradient_checkpointing": "parallel.activation_checkpoint",
    "hidden_size": "model.dim",
    "hidden_layer_sizes": "model.hidden",
    "intermediate_size": "model.mlp_dim",
    "learning_rate": "optim.lr",
    "max_steps": "train.steps",
    "num_hidden_layers": "model.layers",
    "output_dir": "run.dir",
    "save_steps": "checkpoint.every_steps",
}

_WANTS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
}
_LIMITS = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "needs at least {min_length} item(s)",
    "too_long": "takes at most {max_length} item(s)",
    "string_too_short": "must not be empty",
    "string_too_long": "takes at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
}


Kinds = tuple[type[Section], ...]  # the sections among which `name` chooses, where there are several


def sections_of(annotation: Any) -> tuple[Kinds, bool]:
    """The sections inside an annotation, and whether the annotation is a list of them."""
    options = options_of(annotation)
    listed = next((option for option in options if get_origin(option) is list), None)
    if listed is not None:
        return sections_of(get_args(listed)[0])[0], True
    return tuple(option for option in options if is_section(option)), False


def field_at(path: list[str]) -> FieldInfo | None:
    """The field that a path of keys and list indices leads to; None if the schema has none."""
    sections: Kinds = (Config,)
    info: FieldInfo | None = None
    for part in path:
        if index_of(part) is None:
            info = keys(*sections).get(part)
            sections = sections_of(info.annotation)[0] if info is not None else ()
    return info


def valid_keys(node: Node | None, sections: Kinds = (Config,), prefix: str = "") -> Iterator[str]:
    """Every dotted key that may stand in `node`, each section before its keys; `*` stands for an index in a list.
    Without a node (None), the keys of every section that could be chosen by name."""
    written = node.value if node is not None and isinstance(node.value, dict) else None
    for name, info in keys(*(sections if written is None else _meant(sections, written))).items():
        yield prefix + name
        inner, listed = sections_of(info.annotation)
        child = None if listed or written is None else written.get(name)
        yield from valid_keys(child, inner, prefix + name + (".*." if listed else "."))


@cache
def all_keys() -> tuple[str, ...]:
    """Every dotted key of any config."""
    return tuple(valid_keys(None))


def _meant(sections: Kinds, written: dict[str, Node]) -> Kinds:
    """The section that `name` chooses; all of them where none has that name."""
    return named(sections, written["name"].plain() if "name" in written else None)


def nearest(unknown: str, valid: Sequence[str] = ()) -> str | None:
    """The valid dotted key that an unknown key most likely means, by its last name or by its whole path."""
    valid = valid or all_keys()
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", unknown)
    section, _, name = pattern.rpartition(".")
    if ELSEWHERE.get(name) in valid:
        return ELSEWHERE[name]

    def likeness(known: str) -> float:
        its_section, _, its_name = known.rpartition(".")
        stranger = its_section != section and its_name[:2] != name[:2]  # `peft.type` does not mean `start.allow.dtype`
        last = 0.0 if stranger else SequenceMatcher(None, name, its_name).ratio()
        return max(0.9 * last, SequenceMatcher(None, pattern, known).ratio())  # of equal names, the one in this section

    best = max(valid, key=likeness)
    if likeness(best) < 0.62:
        return None
    for index in re.findall(r"\.(\d+)(?=\.|$)", unknown):
        best = best.replace("*", index, 1)
    return best.replace("*", "0")


class Unknown(NamedTuple):
    """A key that the schema does not know: its value, its section, and sections of other names that could stand
    there."""

    key: str
    node: Node
    section: type[Section]
    others: Kinds


def take_unknown(node: Node, sections: Kinds = (Config,), prefix: str = "") -> Iterator[Unknown]:
    """Remove every key that the schema does not know, and yield each."""
    if not isinstance(node.value, dict):
        return
    meant = _meant(sections, node.value)
    known = keys(*meant)
    for name, child in list(node.value.items()):
        key = prefix + name
        if name not in known:
            del node.value[name]
            yield Unknown(key, child, meant[0], tuple(s for s in sections if s not in meant))
            continue
        inner, listed = sections_of(known[name].annotation)
        if not inner:
            continue
        if listed and isinstance(child.value, list):
            for index, item in enumerate(child.value):
                yield from take_unknown(item, inner, f"{key}.{index}.")
        elif not listed:
            yield from take_unknown(child, inner, key + ".")


def explain_unknown(unknown: Unknown, valid: Sequence[str]) -> Problem:
    """`valid`: the keys that may stand in this config."""
    key, inner, section, others = unknown
    parent, _, name = key.rpartition(".")
    if name == "include":
        return Problem(inner.place, "`include` stands at the top of a file, not here")
    having = [name_of(other) for other in others if name in keys(other)]
    if having:
        verb = "has" if len(having) == 1 else "have"
        message = f"unknown key {key}: {parent}.name is {name_of(section)}, and only {' and '.join(having)} {verb} it"
        return Problem(inner.place, message)
    while isinstance(inner.value, dict) and len(inner.value) == 1:  # `optimizer.lr` tells more than `optimizer`
        (name, inner), *_ = inner.value.items()
        key += f".{name}"
    near = nearest(key, valid)
    message = f"unknown key {key}; " + (f"did you mean {near}?" if near else f"valid here: {', '.join(keys(section))}")
    return Problem(unknown.node.place, message)


def explain(error: ValidationError, root: Node, source: Place) -> Iterator[tuple[str, Problem]]:
    """Pydantic's findings as (pydantic's kind, problem). A key that is missing at the root is reported at `source`."""
    for found in error.errors(include_url=False):
        path, info, sections = _field([str(part) for part in found["loc"]])
        kind = found["type"]
        if kind == "union_tag_invalid":
            path.append("name")
        key = ".".join(path)
        at = _locate(root, path, source)
        if kind == "missing":
            message = f"{key} is missing" + (f" ({info.description})" if info else "")
        elif kind == "value_error":
            reason = str(found["ctx"]["error"])
            mentioned = _mentioned(reason, path, root)
            at = max(mentioned, key=lambda place: place.line == 0, default=at)  # an override is likeliest
            others = [str(place) for place in mentioned if place != at]
            message = (f"{key}: " if key else "") + reason + (f" (see also {', '.join(others)})" if others else "")
        elif kind == "union_tag_invalid":
            *names, last = map(name_of, sections)
            message = f"{key} must be one of {', '.join(names)} or {last}, not {show(found['input']['name'])}"
        elif kind == "literal_error":
            message = (
                f"{key} must be one of {found['ctx']['expected'].replace(chr(39), '')}, not {show(found['input'])}"
            )
        elif kind in _LIMITS:
            message = f"{key} {_limit(kind, found['ctx'])}, not {show(found['input'])}"
        elif kind == "model_type" and found["input"] is None:
            message = f"{key} is empty: give its keys or remove the line"
        elif kind in _WANTS:
            message = f"{key} wants {_unit(path[-1], _WANTS[kind])}, not {show(found['input'])}"
            message += _hint(path[-1], kind, found["input"])
        else:
            message = f"{key}: {found['msg'].removeprefix('Input ')}, not {show(found['input'])}"
        yield kind, Problem(at, message)


def _field(location: list[str]) -> tuple[list[str], FieldInfo | None, Kinds]:
    """The path at which pydantic found something, its field, and the sections that may stand there.

    Where several sections may, pydantic adds the name of the one it took to the path. The returned path leaves it out.
    """
    path: list[str] = []
    info: FieldInfo | None = None
    sections: Kinds = (Config,)
    for part in location:
        if index_of(part) is not None:
            path.append(part)
        elif len(sections) > 1:
            sections = named(sections, part)[:1]
        else:
            path.append(part)
            info = keys(*sections).get(part)
            sections = sections_of(info.annotation)[0] if info is not None else ()
    return path, info, sections


def _limit(kind: str, context: dict[str, Any]) -> str:
    limits = {name: context[name] for name in ("gt", "ge", "lt", "le") if name in context}
    shown = {name: f"{n:,.0f}" if 1000 <= n < 1e16 else f"{n:g}" for name, n in limits.items()}
    return _LIMITS[kind].format(**context | shown)


def show(value: Any) -> str:
    """A value as a person would write it."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the text {short(value)!r}"
        case dict():
            return "a section of keys"
        case list():
            return f"the list {short(repr(value))}" if value else "an empty list"
    return short(repr(value))


def short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _locate(root: Node, path: list[str], source: Place) -> Place:
    """The place of the deepest node on a path that somebody wrote."""
    node, at = root, source
    for part in path:
        inner = _child(node, part)
        if inner is None:
            break
        node, at = inner, inner.place
    return at


def _child(node: Node, part: str) -> Node | None:
    value = node.value
    if isinstance(value, dict):
        return value.get(part)
    index = index_of(part)
    return value[index] if isinstance(value, list) and index is not None and index < len(value) else None


def _mentioned(text: str, path: list[str], root: Node) -> list[Place]:
    """The places of the keys that a message names, last one first."""
    places: list[Place] = []
    for word in re.findall(r"[a-z][a-z_.]*[a-z]", text):
        for candidate in ([*path, *word.split(".")], word.split(".")):
            node: Node | None = root
            for part in candidate:
                node = _child(node, part) if node is not None else None
            if node is not None and node.place not in places and not isinstance(node.value, dict):
                places.append(node.place)
    return places[::-1]


def _unit(name: str, wants: str) -> str:
    unit = name.rpartition("_")[2] if "_" in name else ""
    return f"{wants} of {UNITS[unit]}" if unit in UNITS and "number" in wants else wants


def _hint(name: str, kind: str, value: Any) -> str:
    """What to write instead, where that is obvious."""
    if isinstance(value, float) and kind.startswith("int") and value.is_integer():
        return f"; write {int(value)}"
    if not isinstance(value, str) or kind not in ("int_type", "float_type"):
        return ""
    duration = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]+?)(?:s|ours?|utes?|onds?|ays?)?\s*", value.lower())
    if name.endswith("_s") and duration and duration[2] in SECONDS:
        return f"; write {float(duration[1]) * SECONDS[duration[2]]:g}"
    plain = value.replace("_", "").replace(",", "").strip()
    if re.fullmatch(r"[-+]?[0-9]+", plain) or (
        kind == "float_type" and re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", plain)
    ):
        return f"; write {plain}, without quotes"
    return ""
