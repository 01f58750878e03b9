"""Several runs as one job array: a grid of overrides, or a list of them in a file. Each run has its own folder."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from configs.config import Config
from configs.errors import UserError
from configs.files import NotText, read_text
from configs.load import load
from configs.parse import Place, parse
from configs.schema.slurm import SlurmSection
from configs.typed import list_items
from slurm.submit import snapshot
from slurm.submit.submit import Submission, any_alive
from trainer.host.terminal import say
from trainer.life import attempts as life
from trainer.preflight import Problem, problems_of

_POLL_S = 2.0
_LABEL_BYTES = 200  # of a folder's name: a filesystem allows 255, and tools add their own suffixes


class Override(NamedTuple):
    """An override as it was typed, and as it stands in the name of the run's folder."""

    typed: str
    named: str


def overrides_of(words: list[str]) -> list[list[Override]]:
    """The overrides of each run: every combination of the values in `words`. Raises UserError."""
    axes = [_axis(word) for word in words]
    return [list(itertools.chain(*combination)) for combination in itertools.product(*axes)]


def _axis(word: str) -> list[list[Override]]:
    key, equals, text = word.partition("=")
    if not equals:
        return [[Override(typed, typed) for typed in own] for own in _lines(word)]
    try:
        return [[Override(f"{key}={item}", f"{key}={_named(item)}")] for item in list_items(text.strip())]
    except ValueError as error:
        raise UserError(f"--array {word}: {error}; write a list of values, as in optim.lr=[1e-3,3e-4]") from error


def _named(item: str) -> str:
    """The item in the form that YAML 1.1 gave to folder names, which older arrays have: without quotes, 0.10 as 0.1. If
    YAML 1.1 read another value (010 was 8), the item as typed."""
    try:
        (old,) = yaml.safe_load(f"[{item}]")
        if isinstance(old, str):
            return old
        new = parse(item, lambda line: Place("--array", line), [])
        written = json.dumps(old)
    except (yaml.YAMLError, ValueError, TypeError):  # such as a date, which is text now
        return item
    return written if new is not None and written == json.dumps(new.plain()) else item


def _lines(name: str) -> list[list[str]]:
    """The overrides of each line of a file, quoted as for a shell."""
    try:
        text = read_text(Path(name))
    except NotText as error:
        raise UserError(f"--array {name}:{error.line}: {error.strerror}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--array {name}: neither KEY=[A,B] nor a file that can be read: {reason}") from error
    runs = []
    lines = re.split("\r\n|\r|\n", text)  # not splitlines: a value may hold other breaks, such as a form feed
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            runs.append(shlex.split(line))
        except ValueError as error:
            raise UserError(f'--array {name}:{number}: {error}; quote as in a shell: "it\'s"') from error
    return runs


def configs_of(base: Config, words: list[str], argument: str | None, typed: list[str]) -> list[Config]:
    """The config of each run. Its folder is inside that of `base`, and its own overrides name it. Raises UserError."""
    runs = overrides_of(words)
    for own in runs:
        if any(override.typed.startswith(("slurm.", "run.dir=")) for override in own):
            raise UserError("--array: the runs of an array share what is asked of Slurm, and have folders of their own")
    if not runs:
        raise UserError("--array: no runs")
    found = []
    for own, label in zip(runs, labels(runs), strict=True):
        config = load(argument, [*typed, *(override.typed for override in own)])
        # Not as an override: that would be read again, as YAML and with `~` replaced.
        run = config.run.model_copy(update={"dir": str(Path(base.run_dir) / label)})
        found.append(config.model_copy(update={"run": run}))
    return found


def labels(runs: list[list[Override]]) -> list[str]:
    """The name of each run's folder. A long name, or one of several equal names, ends in a digest of its overrides. So
    a run has the same name in every array. Raises UserError for a run that is listed twice."""
    texts = [",".join(override.typed for override in own) for own in runs]
    twice = next((text for text, count in Counter(texts).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"--array: two runs would both be {twice}")
    plain = [re.sub(r"[^\w.=,+-]", "_", ",".join(override.named for override in own)) for own in runs]
    alike = {label for label, count in Counter(plain).items() if count > 1}
    return [
        _shortened(label, text) if label in alike or len(label.encode()) > _LABEL_BYTES else label
        for label, text in zip(plain, texts, strict=True)
    ]


def _shortened(label: str, text: str) -> str:
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:12]
    return f"{label.encode()[: _LABEL_BYTES - 13].decode(errors='ignore')}-{digest}"


class ArraySubmission(Submission):
    """One batch script for all runs. Each task of the array reads the config of its number."""

    def __init__(self, base: Config, request: SlurmSection, configs: list[Config]) -> None:
        super().__init__(base, request)
        self.runs = [Submission(config, request) for config in configs]
        self.configs = {f"config-{n}.yaml": run.configs["config.yaml"] for n, run in enumerate(self.runs)}
        self.own = sorted({name for run in self.runs for name in run.own})
        self.snapshot = snapshot.place(self.place, self.configs, self.own)

    @property
    def config_path(self) -> str:
        return shlex.quote(str(self.snapshot)) + '/config-"$SLURM_ARRAY_TASK_ID".yaml'

    def problems(self, paths: bool) -> list[Problem]:
        """The problems of all runs. Data and `start.from` that several runs share are checked once."""
        found = problems_of(self._check_words, self._check_place)
        seen: set[str] = set()
        for run in self.runs:
            named = f"{run.config.data.model_dump_json()} {run.config.vocab_size} {run.config.start.from_}"
            found += run.problems(paths and named not in seen)
            seen.add(named)
        return found

    def output(self, number: str = "%A_%a") -> str:
        return super().output(number)

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
        """Wait for all runs; return the worst outcome. Ctrl-C leaves the jobs running."""
        try:
            while any_alive(*(run.holder() or number for run in self.runs)):
                time.sleep(_POLL_S)
        except KeyboardInterrupt:
            say(f"\njob {number} goes on without being watched")
            return life.STOPPED
        codes = [run.outcome() for run in self.runs]
        return next((code for code in (life.FAILED, life.USER_ERROR, life.REQUEUE, life.STOPPED) if code in codes), 0)
