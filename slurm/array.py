"""Several runs as one job array: a grid of overrides, or a list of them in a file. Each has a run folder of its own."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError
from configs.load import load
from configs.schema import Config
from configs.slurm_section import SlurmSection
from slurm import snapshot
from slurm.submit import Submission, lives
from trainer import life
from trainer.terminal import say

_POLL_S = 2.0


def overrides_of(words: list[str]) -> list[list[str]]:
    """The overrides of each run: every combination of what `words` list. Raises UserError."""
    axes = [_axis(word) for word in words]
    return [list(itertools.chain(*combination)) for combination in itertools.product(*axes)]


def _axis(word: str) -> list[list[str]]:
    key, equals, text = word.partition("=")
    if not equals:
        try:
            lines = [line.strip() for line in Path(word).read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise UserError(f"--array {word}: neither KEY=[A,B] nor a file that can be read: {error}") from error
        return [shlex.split(line) for line in lines if line and not line.startswith("#")]
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, list) or not values:
        raise UserError(f"--array {word}: expected a list of values, as in optim.lr=[1e-3,3e-4]")
    return [[f"{key}={_written(value)}"] for value in values]


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def configs_of(base: Config, words: list[str], argument: str | None, typed: list[str]) -> list[Config]:
    """The config of each run; its folder lies in that of `base` and is named by what is its own. Raises UserError."""
    found: dict[str, Config] = {}
    for own in overrides_of(words):
        if any(text.startswith(("slurm.", "run.dir=")) for text in own):
            raise UserError("--array: the runs of an array share what is asked of Slurm, and have folders of their own")
        label = re.sub(r"[^\w.=,+-]", "_", ",".join(own))
        if label in found:
            raise UserError(f"--array: two runs would both be {label}")
        found[label] = load(argument, [*typed, *own, f"run.dir={Path(base.run_dir) / label}"])
    if not found:
        raise UserError("--array: no runs")
    return list(found.values())


class ArraySubmission(Submission):
    """One batch script for all: each task of the array reads the config of its number."""

    def __init__(self, base: Config, request: SlurmSection, configs: list[Config]) -> None:
        super().__init__(base, request)
        self.runs = [Submission(config, request) for config in configs]
        self.configs = {f"config-{n}.yaml": run.configs["config.yaml"] for n, run in enumerate(self.runs)}
        self.snapshot = snapshot.place(self.place, self.configs)

    @property
    def config_path(self) -> str:
        return shlex.quote(str(self.snapshot)) + '/config-"$SLURM_ARRAY_TASK_ID".yaml'

    def check(self) -> None:
        for run in self.runs:
            run.check()

    def parameters(self) -> dict[str, Any]:
        return super().parameters() | {"map_count": len(self.runs)}

    def refuse_living(self) -> None:
        for run in self.runs:
            run.refuse_living()

    def note(self, number: str) -> None:
        for task, run in enumerate(self.runs):
            run.note(f"{number}_{task}")
            say(f"{number}_{task}  {run.folder.root}")

    def follow(self, number: str) -> int:
        """Wait for all; the worst outcome. Ctrl-C leaves the jobs running."""
        try:
            while lives(*(run.holder() or number for run in self.runs)):
                time.sleep(_POLL_S)
        except KeyboardInterrupt:
            say(f"\njob {number} goes on without being watched")
            return life.STOPPED
        codes = [run.outcome() for run in self.runs]
        return next((code for code in (life.FAILED, life.USER_ERROR, life.REQUEUE, life.STOPPED) if code in codes), 0)
