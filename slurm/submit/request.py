"""What to ask a cluster for: the config's `slurm` section, then a cluster's own file over it, flags over both."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.config import Config
from configs.errors import UserError
from configs.files import NotText, read_text
from configs.parse import Place, Problem, parse
from configs.schema.slurm import SlurmSection
from configs.typed import settle
from trainer.host.environment import SLURM_JOB_ID, XDG_CONFIG_HOME
from trainer.host.inherited import CLUSTERS, NEEDED

# The variables with a person's own defaults for sbatch. `sbatch` itself would prefer them to the script.
_VARIABLES = {
    "account": "SBATCH_ACCOUNT",
    "constraint": "SBATCH_CONSTRAINT",
    "mem": "SBATCH_MEM_PER_NODE",
    "partition": "SBATCH_PARTITION",
    "qos": "SBATCH_QOS",
    "reservation": "SBATCH_RESERVATION",
    "time": "SBATCH_TIMELIMIT",
}


def cluster_file() -> Path | None:
    """The file with a site's values for all runs of a user. None where the home is unknown."""
    base = XDG_CONFIG_HOME.read(os.environ) or "~/.config"
    try:
        return Path(base).expanduser() / "muster" / "cluster.yaml"
    except RuntimeError:
        return None


def of_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a person's SBATCH_ variables ask for. Inside a job they belong to that job, so they ask for nothing."""
    if SLURM_JOB_ID.read(environment) is not None:
        return {}
    return {name: environment[variable] for name, variable in _VARIABLES.items() if environment.get(variable)}


def not_heard(environment: Mapping[str, str]) -> str | None:
    """A line that names the variables which a plain `sbatch` takes as options, and `slurm submit` ignores."""
    job = SLURM_JOB_ID.read(environment)
    told: tuple[str, ...] = ("SBATCH_", "SLURM_")
    heard, why = {*_VARIABLES.values(), *NEEDED, CLUSTERS}, "the job is as its script says"
    if job is not None:  # the job itself has SLURM_... variables
        told, heard, why = ("SBATCH_",), set(), f"of job {job}, in which this was typed"
    names = [name for name in sorted(environment) if name.startswith(told) and name not in heard]
    return (
        f"not handed on: {', '.join(names)} ({why}); say it by flags, by slurm.sbatch or slurm.srun" if names else None
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each plain field of the section."""
    for name, info in SlurmSection.model_fields.items():
        kind = str(info.annotation)
        if any(part in kind for part in ("dict", "list", "bool")):
            continue  # overrides set these
        flag, doc = f"--{name.replace('_', '-')}", str(info.description)
        if "int" in kind:
            parser.add_argument(flag, type=int, metavar="N", help=doc)
        else:
            parser.add_argument(flag, metavar="TEXT", help=doc)
    parser.add_argument("--no-snapshot", action="store_true", help="run the code where it lies, as it is then")


def request_of(config: Config, overrides: list[str], options: argparse.Namespace) -> SlurmSection:
    """The request. A flag or `slurm.x=y` wins over both files. SBATCH_ variables come last."""
    in_config = config.slurm.model_dump(exclude_unset=True)
    typed = {text.partition("=")[0].strip().split(".")[1] for text in overrides if text.strip().startswith("slurm.")}
    over = {name: value for name, value in in_config.items() if name in typed}
    for name in SlurmSection.model_fields:
        given = getattr(options, name, None)
        if given is not None:
            over[name] = given
    if options.no_snapshot:
        over["snapshot"] = False
    place, of_person = cluster_file(), of_environment(os.environ)
    of_site = _read_file(place) if place is not None else {}
    _section(of_person, "the environment (SBATCH_...)")
    return _section({**of_person, **in_config, **of_site, **over}, "the command line")


def _section(values: dict[str, Any], place: str) -> SlurmSection:
    """The section with these values. Raises UserError, which names `place`, the origin of the values."""
    try:
        return SlurmSection.model_validate(values)
    except ValidationError as error:
        raise UserError(_told(error, place)) from error


def _read_file(path: Path) -> dict[str, Any]:
    """The values of the cluster's file, checked alone, so that its mistakes are reported as its own."""
    problems: list[Problem] = []
    try:
        node = parse(read_text(path), lambda line: Place(str(path), line), problems)
    except FileNotFoundError:
        return {}
    except NotText as error:
        raise UserError(f"{path}:{error.line}: {error.strerror}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if node is not None:
        settle(node, SlurmSection, problems)
    if problems:
        raise UserError(str(problems[0]))
    data = node.plain() if node is not None else {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected lines of `key: value`, as below `slurm:` in a config")
    _section(data, str(path))
    return data


def _told(error: ValidationError, place: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, SlurmSection.model_fields, n=1)
        return f"{place}: there is no key {key!r}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{place}: {key}: {first['msg']}"
