"""What a value means that somebody typed, in a shell or in a file. The rule:

1. A value is what YAML 1.2 calls it: `10`, `010` (ten), `.5`, `1e-3`, `true`, `null`, `[a, b]`, `{a: b}`. Nothing else
   is converted: `on`, `1:30`, `1_000` and dates are text.
2. For a key that holds text, the value is the text itself: `12`, `007`; in a shell also `Set #3` and `Q: what`. Only
   `null`, or an empty value, means that there is no value.
3. Quotes around a whole value are removed. All other quotes belong to the value.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Annotated, Any, Union, get_args, get_origin

import yaml

from configs.parse import Node, Place, Problem, events_of, index_of, parse, plain_scalar
from configs.schema.section import Section, is_section, keys


def options_of(annotation: Any) -> tuple[Any, ...]:
    """The types that a field takes."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return options_of(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(option for one in get_args(annotation) for option in options_of(one))
    return (annotation,)


def options_at(section: type[Section], path: Iterable[str]) -> tuple[Any, ...]:
    """The types of the value at a path of keys and list indices; empty if the schema has no such key."""
    options: tuple[Any, ...] = (section,)
    for part in path:
        options = tuple(inner for option in options for inner in _inside(option, part))
    return options


def _inside(option: Any, part: str) -> tuple[Any, ...]:
    origin = get_origin(option)
    if origin is list:
        return options_of(get_args(option)[0]) if index_of(part) is not None else ()
    if origin is dict:
        return options_of(get_args(option)[1])
    if is_section(option):
        info = keys(option).get(part)
        return options_of(info.annotation) if info is not None else ()
    return ()


def in_shell(text: str, options: tuple[Any, ...], place: Place, problems: list[Problem]) -> Node:
    """The node of a value typed in a shell, for a key of these types."""
    bare = text.strip()
    if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\"":
        quoted = parse(bare, lambda _: place, [])
        if quoted is not None and isinstance(quoted.value, str):
            return quoted
    if str in options:
        return Node(None if bare in ("", "null") else text, place)
    if not bare.startswith(("[", "{")):
        return plain_scalar(bare, place, problems)
    if not bare.endswith(("]", "}")):  # YAML would drop ` # what follows`
        problems.append(Problem(place, "a list or section must end with its bracket"))
        return Node(None, place)
    return parse(bare, lambda _: place, problems) or Node(None, place)


def list_items(text: str) -> list[str]:
    """The items of a list typed in a shell, each as typed. Raises ValueError, which says what is wrong."""
    items: list[str] = []
    level, begun = 0, 0
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError("a list stands in brackets")
    try:
        for event in events_of(text):
            first, last = event.start_mark, event.end_mark
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise ValueError("text that begins with *, & or ! needs quotes")
            if isinstance(event, yaml.CollectionEndEvent):
                level -= 1
            if level == 1 and isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
                begun = first.index
            if level == 1 and isinstance(event, yaml.ScalarEvent | yaml.CollectionEndEvent):
                items.append(text[begun : last.index])
            if isinstance(event, yaml.CollectionStartEvent):
                level += 1
    except yaml.YAMLError as error:
        raise ValueError("the list cannot be read") from error
    if not items:
        raise ValueError("the list is empty")
    return items


def settle(root: Node, section: type[Section], problems: list[Problem]) -> None:
    """Give each key that holds text the text that was typed. Report values that no path or program can be given."""
    _settle(root, (section,), "", problems)


def _settle(node: Node, options: tuple[Any, ...], key: str, problems: list[Problem]) -> None:
    value = node.value
    if isinstance(value, dict):
        for name, inner in value.items():
            _check(name, inner.place, key or name, problems)
            within = tuple(found for option in options for found in _inside(option, name))
            _settle(inner, within, f"{key}.{name}" if key else name, problems)
    elif isinstance(value, list):
        within = tuple(found for option in options for found in _inside(option, "0"))
        for index, inner in enumerate(value):
            _settle(inner, within, f"{key}.{index}", problems)
    elif isinstance(value, str):
        _check(value, node.place, key, problems)
    elif node.typed is not None and value is not None and str in options:
        node.value = node.typed


def _check(text: str, place: Place, key: str, problems: list[Problem]) -> None:
    if "\0" in text:
        problems.append(Problem(place, f"{key} holds a NUL character"))
