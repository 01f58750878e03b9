"""What to ask a cluster for: the config's `slurm` section, a cluster's own file over it, flags over both."""

from __future__ import annotations

import argparse
import difflib
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.errors import UserError
from configs.parse import Place, Problem, parse
from configs.schema import Config
from configs.slurm_section import SlurmSection
from trainer.environment import XDG_CONFIG_HOME


def cluster_file() -> Path:
    """Where a site's own values stand, for all runs of a user."""
    base = XDG_CONFIG_HOME.read(os.environ) or "~/.config"
    return Path(base).expanduser() / "muster" / "cluster.yaml"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each plain field of the section."""
    for name, info in SlurmSection.model_fields.items():
        kind = str(info.annotation)
        if any(part in kind for part in ("dict", "list", "bool")):
            continue  # overrides say these
        flag, doc = f"--{name.replace('_', '-')}", str(info.description)
        if "int" in kind:
            parser.add_argument(flag, type=int, metavar="N", help=doc)
        else:
            parser.add_argument(flag, metavar="TEXT", help=doc)
    parser.add_argument("--no-snapshot", action="store_true", help="run the code where it lies, as it is then")


def request_of(config: Config, overrides: list[str], options: argparse.Namespace) -> SlurmSection:
    """The request. What a person typed, as a flag or as slurm.x=y, lies above both files."""
    in_config = config.slurm.model_dump(exclude_unset=True)
    typed = {text.partition("=")[0].strip().split(".")[1] for text in overrides if text.strip().startswith("slurm.")}
    over = {name: value for name, value in in_config.items() if name in typed}
    for name in SlurmSection.model_fields:
        given = getattr(options, name, None)
        if given is not None:
            over[name] = given
    if options.no_snapshot:
        over["snapshot"] = False
    of_site = _read_file(cluster_file())
    try:
        return SlurmSection.model_validate({**in_config, **of_site, **over})
    except ValidationError as error:
        raise UserError(_told(error, "the command line")) from error


def _read_file(path: Path) -> dict[str, Any]:
    """The cluster's file, checked by itself so that its mistakes are told as its own."""
    problems: list[Problem] = []
    try:
        node = parse(path.read_text(encoding="utf-8"), lambda line: Place(str(path), line), problems)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if problems:
        raise UserError(str(problems[0]))
    data = node.plain() if node is not None else {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected lines of `key: value`, as below `slurm:` in a config")
    try:
        SlurmSection.model_validate(data)
    except ValidationError as error:
        raise UserError(_told(error, str(path))) from error
    return data


def _told(error: ValidationError, place: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, SlurmSection.model_fields, n=1)
        return f"{place}: there is no key {key!r}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{place}: {key}: {first['msg']}"


def minutes(text: str) -> float | None:
    """A time limit as Slurm reads it; None without an end. Raises UserError."""
    if text.upper() in ("UNLIMITED", "INFINITE", "-1"):
        return None
    days, dash, rest = text.partition("-")
    parts = (rest if dash else text).split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise UserError(f'time {text!r}: write it as Slurm does: "30" minutes, "12:00:00" or "2-00:00:00"')
    numbers = [int(part) for part in parts]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, mins, seconds = (*numbers, 0, 0)[:3]
        return int(days) * 1440 + hours * 60 + mins + seconds / 60
    if len(numbers) == 3:
        return numbers[0] * 60 + numbers[1] + numbers[2] / 60
    return numbers[0] + (numbers[1] / 60 if len(numbers) == 2 else 0)
