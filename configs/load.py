"""Make a config from a preset or YAML file and `key=value` overrides. Imports no torch.

A file may begin with `include: NAME` (or a list): a preset, or a path relative to the file. The file's own keys win
over the included ones. Sections merge key by key, any other value is replaced whole. All mistakes are reported at once.
"""

from __future__ import annotations

import difflib
import os
import re
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.config import Config
from configs.errors import UserError, printable
from configs.explain import explain, explain_unknown, field_at, short, show, take_unknown, valid_keys
from configs.files import NotText, read_text
from configs.fingerprint import to_dict
from configs.parse import Node, Place, Problem, index_of, parse, teach_core
from configs.presets import FOLDER, presets
from configs.typed import in_shell, options_at, settle

DEFAULT = "demo"
MOST_LINES = 20  # of one error
MOST_EXPLAINED = 50  # per kind of mistake: a wrong file may hold a hundred thousand


def load(argument: str | None, overrides: list[str]) -> Config:
    """The config of a preset's name or a YAML file (None: the demo), with dotted overrides such as `train.steps=100`.

    Raises UserError with one line per mistake. Rules between keys (such as dim and heads) are checked only where the
    keys themselves are right.
    """
    problems: list[Problem] = []
    source = Place(argument or DEFAULT)
    root: Node | None = None
    path = find(argument or DEFAULT, Path(), Place("command line"), problems, included=False)
    if path is not None:
        source = Place(_shown(path))
        root = _read(path, (), problems)
    blocked = any(problem.blocking for problem in problems)
    root = root or Node({}, source)
    for text in overrides:
        _override(root, text, problems)
    unknown = list(take_unknown(root))
    valid = tuple(valid_keys(root)) if unknown else ()
    problems.extend(explain_unknown(one, valid) for one in unknown[:MOST_EXPLAINED])
    unsaid = len(unknown[MOST_EXPLAINED:])
    settle(root, Config, problems)
    try:
        config = Config.model_validate(root.plain())
    except ValidationError as error:
        found = islice(explain(error, root, source), MOST_EXPLAINED)
        problems.extend(problem for kind, problem in found if kind != "missing" or not blocked)
        unsaid += max(error.error_count() - MOST_EXPLAINED, 0)
        config = None
    if problems or config is None:
        raise UserError(_report(problems, overrides, unsaid))
    return config


def dump(config: Config, ascii_only: bool = False) -> str:
    """A config as YAML, in the schema's order. `load` of this text gives an equal config."""
    parts = [
        yaml.dump({name: section}, Dumper=_Dumper, sort_keys=False, allow_unicode=not ascii_only, width=2**30)
        for name, section in to_dict(config).items()
    ]
    return "\n".join(parts)


def find(argument: str, folder: Path, place: Place, problems: list[Problem], included: bool) -> Path | None:
    """The file that `argument` means: a preset's name, or a path relative to `folder`. None (problem added) if none."""
    preset = FOLDER / f"{argument}.yaml"
    # os.path, unlike Path, raises no error for names that no filesystem takes.
    if "/" not in argument and os.path.isfile(preset) and (included or not argument.startswith("_")):
        return preset
    path = folder / argument
    if os.path.isdir(path):
        inside = path / "config.yaml"
        hint = f"did you mean {_shown(inside)}?" if inside.is_file() else "name a YAML file"
        problems.append(Problem(place, f"{argument} is a folder; {hint}", True))
        return None
    if os.path.exists(path):
        return path
    is_path = "/" in argument or path.suffix in (".yaml", ".yml")
    message = f"there is no file {_shown(path)}" if is_path else f"there is no preset {argument!r}"
    near = difflib.get_close_matches(path.stem, presets(), n=1, cutoff=0.5)
    message += f"; did you mean {near[0]}?" if near else ""
    problems.append(Problem(place, f"{message} (presets: {', '.join(presets())})", True))
    return None


def _shown(path: Path) -> str:
    """The shortest name of a path from the current folder."""
    try:
        relative = os.path.relpath(path)
    except OSError:  # the current folder was removed
        return str(path)
    return str(path) if relative.startswith("..") else relative


def _read(path: Path, chain: tuple[Path, ...], problems: list[Problem]) -> Node | None:
    """The content of a file over the content of the files it includes. `chain` holds the files that include it."""
    name = _shown(path)
    try:
        text = read_text(path)
    except NotText as error:
        problems.append(Problem(Place(name, error.line), str(error.strerror), True))
        return None
    except OSError as error:
        problems.append(Problem(Place(name), f"cannot be read: {error.strerror}", True))
        return None
    before = len(problems)
    node = parse(text, lambda line: Place(name, line), problems)
    if node is None:
        if len(problems) == before:
            problems.append(Problem(Place(name), "is empty", True))
        return None
    if not isinstance(node.value, dict):
        problems.append(Problem(node.place, f"expected lines of `key: value`, not {show(node.plain())}", True))
        return None
    include = node.value.pop("include", None)
    below = Node({}, node.place)
    for item in _includes(include, problems):
        target = find(item.value, path.parent, item.place, problems, included=True)
        if target is None:
            continue
        circle = [*chain, path]
        if target.resolve() in [p.resolve() for p in circle]:
            names = " -> ".join(_shown(p) for p in [*circle, target])
            problems.append(Problem(item.place, f"include goes in a circle: {names}", True))
            continue
        included = _read(target, (*chain, path), problems)
        if included is not None:
            below = _merge(below, included)
    return _merge(below, node)


def _includes(node: Node | None, problems: list[Problem]) -> list[Node]:
    if node is None:
        return []
    items = node.value if isinstance(node.value, list) else [node]
    for item in items:
        if not isinstance(item.value, str) or not item.value:
            problems.append(Problem(item.place, f"include wants a preset or a file, not {show(item.plain())}"))
    return [item for item in items if isinstance(item.value, str) and item.value]


def _merge(below: Node, above: Node) -> Node:
    """Merge sections key by key; replace any other value."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    merged = dict(below.value)
    for key, node in above.value.items():
        merged[key] = _merge(merged[key], node) if key in merged else node
    return Node(merged, above.place)


def _command_line(text: str) -> Place:
    return Place(f"command line: {short(' '.join(text.split()))}")


def _override(root: Node, text: str, problems: list[Problem]) -> None:
    """Set one `a.b=value` in place. A number in the path is an index in a list."""
    place = _command_line(text)
    key, equals, written = text.partition("=")
    path = key.strip().split(".")
    if re.search("[\ud800-\udfff]", text):  # how Python represents a byte of an argument that it could not decode
        problems.append(Problem(place, "holds a byte that is no UTF-8"))
        return
    if not equals or not all(path):
        problems.append(Problem(place, "expected key=value, for example train.steps=100"))
        return
    before = len(problems)
    value = in_shell(written, options_at(Config, path), place, problems)
    if len(problems) > before:
        return
    node = root
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        new = value if last else _default(path[: depth + 1], place)
        if isinstance(node.value, list):
            index = index_of(part)
            if index is None or index >= len(node.value):
                have = f"items 0 to {len(node.value) - 1}" if node.value else "no items"
                problems.append(Problem(place, f"{'.'.join(path[:depth])} has {have}, not {short(part)!r}"))
                return
            if last:
                node.value[index] = new
            node = node.value[index]
            continue
        if not isinstance(node.value, dict):  # e.g. null in the file becomes a section
            node.value, node.place = {}, place
        if last:
            node.value[part] = new
        node = node.value.setdefault(part, new)


def _default(path: list[str], place: Place) -> Node:
    """What an override changes where the file gives nothing: the schema's default list, or an empty section."""
    info = field_at(path)
    if info is not None and isinstance(info.default, list):
        return Node([Node(item, place) for item in info.default], place)
    return Node({}, place)


def _report(problems: list[Problem], overrides: list[str], unsaid: int) -> str:
    """One line per mistake: those of files first, by line, then those of overrides, in the given order."""
    order = {_command_line(text): rank for rank, text in enumerate(overrides, start=1)}
    problems = sorted(set(problems), key=lambda p: (order.get(p.place, 0), p.place, p.message))
    lines = [printable(str(problem)).replace("\n", "\\n") for problem in problems[:MOST_LINES]]
    count = len(problems) + unsaid
    if count > len(lines):
        lines.append(f"and {count - len(lines)} more")
    return lines[0] if len(lines) == 1 else "\n".join([f"{count} mistakes in the config:", *lines])


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type; writes lists of plain values in one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_float(dumper: _Dumper, value: float) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))  # e.g. 1e-05: YAML 1.1 reads text


def _represent_list(dumper: _Dumper, value: list[Any]) -> yaml.Node:
    plain = not any(isinstance(item, dict | list) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=plain)


def _represent_text(dumper: _Dumper, value: str) -> yaml.Node:
    # PyYAML's other styles lose line breaks other than \n, such as U+0085.
    style = None if value.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


teach_core(_Dumper)
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(list, _represent_list)
