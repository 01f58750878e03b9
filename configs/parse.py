"""YAML as configs are written: the values of YAML 1.2, no key twice, and the place of everything.

Plain `yaml.safe_load` follows YAML 1.1, where `1e-4` is text, `on` is true and `1:30` is the number 90, and where the
second of two equal keys wins in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml


class Place(NamedTuple):
    """Where something was written: a file and its line (from 1), or the command line (line 0)."""

    name: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


class Problem(NamedTuple):
    """One mistake. After a blocking one the rest of the config cannot be read, so nothing counts as missing."""

    place: Place
    message: str
    blocking: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


@dataclass
class Node:
    """A value (a dict or list holds nodes) and where it was written: the line of its key, if it has one."""

    value: Any
    place: Place

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


_TAG = "tag:yaml.org,2002:"
# The core schema of YAML 1.2.2, chapter 10.3.2: tag, form, first characters.
CORE = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


def teach_core(resolver: Any) -> None:
    """Add the core schema's plain values to a loader's or dumper's own."""
    for name, form, first in CORE:
        firsts = ["" if c == "\0" else c for c in first]  # "" stands for the empty scalar
        resolver.add_implicit_resolver(_TAG + name, re.compile(rf"(?:{form})\Z"), firsts)


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # five times as fast where libyaml is there


class Loader(_Base):
    """Composes nodes with their lines; nothing is constructed, so no tag can run anything."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own name; empty: none of YAML 1.1)


teach_core(Loader)


def parse(text: str, place: Callable[[int], Place], problems: list[Problem]) -> Node | None:
    """One YAML document as a node; None if it is empty or (problem added) cannot be read.

    `place` turns a line of the text, counted from 1, into a place.
    """
    loader = None
    try:
        loader = Loader(text)  # reads ahead, so that it may fail as well
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        at = place(text.count("\n", 0, error.position) + 1)
        problems.append(Problem(at, f"not valid YAML: the character U+{_code(error):04X} is not allowed", True))
        return None
    except yaml.MarkedYAMLError as error:
        problems.append(_syntax(error, text, place))
        return None
    finally:
        if loader is not None:
            loader.dispose()
    return None if root is None else _convert(root, place, None, problems, ())


def _code(error: yaml.reader.ReaderError) -> int:
    return error.character if isinstance(error.character, int) else ord(error.character)


def _syntax(error: yaml.MarkedYAMLError, text: str, place: Callable[[int], Place]) -> Problem:
    """A syntax error in one line, with a hint at the usual causes."""
    what = " ".join(str(error.problem or error.context or "unreadable").split())
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
    if "expected a single document" in str(error.context) or "but found another document" in what:
        return Problem(place(line), "a second document begins here; a file holds one config", True)
    hint = ""
    if "mapping values are not allowed" in what:
        hint = "; a wrong indentation, or text with `: ` in it that needs quotes"
    elif "cannot start any token" in what:
        tab = line <= len(lines) and "\t" in lines[line - 1]
        hint = "; indent with spaces, not tabs" if tab else "; text that begins with this character needs quotes"
    elif "alias" in what or "alias" in str(error.context) or "anchor" in str(error.context):
        hint = "; text that begins with * or & needs quotes"
    elif error.context_mark is not None and error.context_mark.line + 1 < line and place(line).line:
        hint = f"; begun in line {error.context_mark.line + 1}"
    return Problem(place(line), f"not valid YAML: {what}{hint}", True)


def _convert(
    node: yaml.Node,
    place: Callable[[int], Place],
    at: Place | None,
    problems: list[Problem],
    within: tuple[yaml.Node, ...],
) -> Node:
    at = at or place(node.start_mark.line + 1)
    if node in within:
        problems.append(Problem(at, "an alias of something that holds it"))
        return Node(None, at)
    within = (*within, node)
    if isinstance(node, yaml.ScalarNode):
        return Node(_scalar(node, at, problems), at)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return Node([_convert(item, place, None, problems, within) for item in node.value], at)
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return Node(_mapping(node, place, problems, within), at)
    problems.append(Problem(at, f"the tag {node.tag} is not known here; configs hold plain data only"))
    return Node(None, at)


def _mapping(
    node: yaml.MappingNode, place: Callable[[int], Place], problems: list[Problem], within: tuple[yaml.Node, ...]
) -> dict[str, Node]:
    result: dict[str, Node] = {}
    for key, value in node.value:
        at = place(key.start_mark.line + 1)
        if not isinstance(key, yaml.ScalarNode) or key.tag != _TAG + "str":
            shown = f"`{key.value}`" if isinstance(key, yaml.ScalarNode) else "a list or section"
            problems.append(Problem(at, f"a key must be a name, not {shown}"))
        elif key.value in result:
            problems.append(
                Problem(at, f"the key {key.value} stands twice, first in line {result[key.value].place.line}")
            )
        else:
            result[key.value] = _convert(value, place, at, problems, within)
    return result


def _scalar(node: yaml.ScalarNode, at: Place, problems: list[Problem]) -> Any:
    text: str = node.value
    try:
        match node.tag.removeprefix(_TAG):
            case "str":
                return text
            case "null":
                return None
            case "bool":
                return {"true": True, "false": False}[text.lower()]
            case "int":
                return int(text, 0) if text[:2] in ("0o", "0x") else int(text)  # int("007", 0) would be refused
            case "float":
                return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    except (ValueError, KeyError):
        problems.append(Problem(at, f"`{text[:40]}` cannot be read as {node.tag.removeprefix(_TAG)}"))
        return None
    problems.append(Problem(at, f"the tag {node.tag} is not known here; configs hold plain data only"))
    return None
