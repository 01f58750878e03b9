"""YAML as configs are written: the values of YAML 1.2, no key twice, and the place of everything.

Plain `yaml.safe_load` follows YAML 1.1: `1e-4` is text, `on` is true, and `1:30` is the number 90. Of two equal keys it
takes the second without a warning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml


class Place(NamedTuple):
    """Where something was written: a file and its line (from 1), or the command line (line 0)."""

    name: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


class Problem(NamedTuple):
    """One mistake. After a `blocking` one the rest of the config is not read, so missing keys are not reported."""

    place: Place
    message: str
    blocking: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


@dataclass(slots=True)
class Node:
    """A value (a dict or list holds nodes) and its place: the line of its key, if it has one."""

    value: Any
    place: Place
    typed: str | None = None  # how a value without quotes was written, such as `007` where the value is 7

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


MOST_LEVELS = 100  # of sections and lists within each other
MOST_COPIES = 100_000  # how many values all aliases of one text may stand for

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
_FORMS = {
    first: [(name, re.compile(rf"(?:{form})\Z")) for name, form, firsts in CORE if first in firsts]
    for first in {c for _, _, firsts in CORE for c in firsts}
}


def teach_core(resolver: Any) -> None:
    """Add the core schema's plain values to those that a dumper knows."""
    for name, form, first in CORE:
        firsts = ["" if c == "\0" else c for c in first]  # "" stands for the empty scalar
        resolver.add_implicit_resolver(_TAG + name, re.compile(rf"(?:{form})\Z"), firsts)


def events_of(text: str) -> Iterator[Any]:
    """The parser's events of a YAML text, one by one. Raises yaml.YAMLError."""
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # five times as fast, where libyaml is installed
    return iter(loader(text).get_event, None)  # get_event returns None after the end


def parse(text: str, place: Callable[[int], Place], problems: list[Problem]) -> Node | None:
    """One YAML document as a node; None if it is empty or (problem added) cannot be read.

    `place` turns a line of the text, counted from 1, into a place.
    """
    try:
        return _Reader(text, place, problems).document()
    except yaml.reader.ReaderError as error:
        at = place(text.count("\n", 0, error.position) + 1)
        problems.append(Problem(at, f"not valid YAML: the character U+{_code(error):04X} is not allowed", True))
    except yaml.MarkedYAMLError as error:
        problems.append(_syntax(error, text, place))
    except _Unreadable as error:
        problems.append(error.problem)
    return None


def plain_scalar(text: str, at: Place, problems: list[Problem]) -> Node:
    """The value of a text without quotes, by the core schema."""
    for tag, form in _FORMS.get(text[:1] or "\0", ()):
        if form.match(text):
            return Node(_scalar(tag, text, at, problems), at, text)
    return Node(text, at, text)


def index_of(part: str) -> int | None:
    """The index in a list that one part of a dotted key stands for."""
    return int(part) if re.fullmatch("[0-9]{1,9}", part) else None


class _Unreadable(Exception):
    """Stops the reading where more of it would only repeat the same mistake."""

    def __init__(self, place: Place, message: str) -> None:
        self.problem = Problem(place, message, True)


@dataclass
class _Reader:
    """Turns the parser's events into nodes. It constructs no objects, so no tag can run code."""

    text: str
    place: Callable[[int], Place]
    problems: list[Problem]
    anchors: dict[str, Node | None] = field(default_factory=dict)  # None: an anchor that has begun and not ended
    copies: int = 0

    def document(self) -> Node | None:
        self.events = events_of(self.text)
        next(self.events)  # the stream begins
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return None
        node = self.node(next(self.events), None, 0)
        next(self.events)  # the document ends
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise _Unreadable(self.at(after), "a second document begins here; a file holds one config")
        return node

    def at(self, event: Any) -> Place:
        return self.place(event.start_mark.line + 1)

    def node(self, event: Any, at: Place | None, level: int) -> Node:
        """The node that begins with `event`; `at` is the place of its key."""
        at = at or self.at(event)
        self.bound(level, event)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, at, level)
        if event.anchor is not None:
            if event.anchor in self.anchors:
                self.problems.append(Problem(self.at(event), f"the anchor &{event.anchor} stands twice"))
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = self.scalar(event, at)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = Node(list(self.items(level)), at)
            self.expect(event, "seq", node)
        else:
            node = Node(self.mapping(level), at)
            self.expect(event, "map", node)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def bound(self, level: int, event: Any) -> None:
        if level > MOST_LEVELS:
            raise _Unreadable(self.at(event), f"more than {MOST_LEVELS} sections or lists inside each other")

    def items(self, level: int) -> Iterator[Node]:
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            yield self.node(event, None, level + 1)

    def mapping(self, level: int) -> dict[str, Node]:
        result: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            at = self.at(event)
            key = self.node(event, None, level + 1)
            value = self.node(next(self.events), at, level + 1)
            if not isinstance(key.value, str):
                shown = "a list or section" if key.typed is None else f"`{key.typed}`"
                self.problems.append(Problem(at, f"a key must be a name, not {shown}"))
            elif key.value in result:
                first = result[key.value].place.line
                where = f", first in line {first}" if first else ""
                self.problems.append(Problem(at, f"the key {key.value} stands twice{where}"))
            else:
                result[key.value] = value
        return result

    def scalar(self, event: Any, at: Place) -> Node:
        if event.tag in (None, "!"):
            is_plain = event.tag is None and event.implicit[0]
            return plain_scalar(event.value, at, self.problems) if is_plain else Node(event.value, at)
        return Node(_scalar(event.tag.removeprefix(_TAG), event.value, at, self.problems), at)

    def expect(self, event: Any, kind: str, node: Node) -> None:
        if event.tag not in (None, "!", _TAG + kind):
            self.problems.append(_unknown_tag(event.tag, node.place))
            node.value = None

    def alias(self, event: Any, at: Place, level: int) -> Node:
        if event.anchor not in self.anchors:
            hint = "text that begins with * or & needs quotes"
            raise _Unreadable(self.at(event), f"not valid YAML: found undefined alias; {hint}")
        node = self.anchors[event.anchor]
        if node is None:
            self.problems.append(Problem(self.at(event), "an alias of something that holds it"))
            return Node(None, at)
        return Node(self.copy(node, event, level).value, at, node.typed)

    def copy(self, node: Node, event: Any, level: int) -> Node:
        """A copy of an alias's node, since an override may change one of them. Nested aliases grow tenfold per line."""
        self.bound(level, event)
        self.copies += 1
        if self.copies > MOST_COPIES:
            raise _Unreadable(self.at(event), f"with *{event.anchor}, aliases stand for over {MOST_COPIES:,} values")
        value = node.value
        if isinstance(value, dict):
            value = {key: self.copy(inner, event, level + 1) for key, inner in value.items()}
        elif isinstance(value, list):
            value = [self.copy(inner, event, level + 1) for inner in value]
        return Node(value, node.place, node.typed)


def _unknown_tag(tag: str, at: Place) -> Problem:
    return Problem(at, f"the tag {tag} is not known here; configs hold plain data only")


def _code(error: yaml.reader.ReaderError) -> int:
    return error.character if isinstance(error.character, int) else ord(error.character)


def _syntax(error: yaml.MarkedYAMLError, text: str, place: Callable[[int], Place]) -> Problem:
    """A syntax error in one line, with a hint at the usual causes."""
    what = " ".join(str(error.problem or error.context or "unreadable").split())
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
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


def _scalar(tag: str, text: str, at: Place, problems: list[Problem]) -> Any:
    try:
        match tag:
            case "str":
                return text
            case "null":
                return None
            case "bool":
                return {"true": True, "false": False}[text.lower()]
            case "int":
                return int(text, 0) if text[:2] in ("0o", "0x") else int(text)  # int("007", 0) would raise
            case "float":
                return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    except (ValueError, KeyError):
        problems.append(Problem(at, f"`{text[:40]}` cannot be read as {tag}"))
        return None
    problems.append(_unknown_tag(tag if ":" in tag else _TAG + tag, at))
    return None
