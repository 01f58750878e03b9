"""Where the rows of metrics.jsonl also go, to be drawn: TensorBoard, and Weights & Biases. Rank 0 only.

Both get the numbers of the same row, and the monitors' readings of the GPUs. After a restart no step appears twice.
TensorBoard drops the old values of a repeated step, Weights & Biases keeps them.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from configs.config import Config
from configs.errors import UserError
from configs.fingerprint import to_dict
from configs.schema.run import RunSection
from trainer.life.events import tolerate_unwritable
from trainer.life.folder import RunFolder, write_json
from trainer.life.rows import amount, facts_in, read_rows, text

Row = dict[str, Any]
_PATIENCE_S = 30  # for a server that does not answer, at the start and at the end
_OWN_SECTIONS = {"monitor", "slurm"}  # may hold a command with a token in it, which another's server must not get


class Series(Protocol):
    """Numbers by step."""

    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def check_series(run: RunSection) -> None:
    """Raise UserError when a package is missing, before any file is changed."""
    for wanted, package, name, without in (
        (run.tensorboard, "tensorboard", "tensorboard", "run.tensorboard=false"),
        (run.wandb is not None, "wandb", "muster[wandb]", "leave run.wandb out"),
    ):
        try:
            if wanted:
                metadata.version(package)  # an import would also find a stray folder `wandb`
        except metadata.PackageNotFoundError:
            how = f"install it: pip install '{name}', or {without}"
            raise UserError(f"run.{package} needs the package {package}, and there is none\n{how}") from None


def open_series(config: Config, folder: RunFolder, first_step: int, say: Callable[[str], None]) -> list[Series]:
    """The series that the config asks for. `first_step`: that of this attempt. Raises UserError without a login."""
    found: list[Series] = []
    if config.run.tensorboard:
        found.append(TensorBoard(folder.tensorboard, first_step))
    if config.run.wandb is not None:
        found.append(WeightsAndBiases(config.run.wandb, config, folder, say))
    return found


class TensorBoard:
    """Scalars in an event file, by tensorboard's own writer. (Its torch front end takes seconds to import.)"""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        self._first_step: int | None = first_step
        self._writer: Any = None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        with tolerate_unwritable():
            writer, self._writer = self._writer or self._open(step), None
            writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._writer = writer  # a writer that failed once fails for ever: the next row begins a new file

    def _open(self, step: int) -> Any:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        writer = EventFileWriter(str(self._folder))
        cut, self._first_step = self._first_step if self._first_step is not None else step, None
        # Readers then drop the content of earlier files from this step on.
        writer.add_event(Event(wall_time=time.time(), step=cut, session_log=SessionLog(status=SessionLog.START)))
        return writer

    def close(self) -> None:
        if self._writer is not None:
            with tolerate_unwritable():
                self._writer.close()


class WeightsAndBiases:
    """One run of W&B for the whole run folder, which holds its id. WANDB_MODE=offline writes files only.

    It gets only the numbers and the config: no command line, git address, output or environment. Its first failure is
    reported, and the run goes on without it.
    """

    def __init__(self, project: str, config: Config, folder: RunFolder, say: Callable[[str], None]) -> None:
        import wandb

        self._say, self._run = say, None
        known = text(facts_in(folder.wandb / "run.json"), "id")
        name = known or secrets.token_hex(4)
        # W&B refuses numbers for steps before its last.
        self._done = max((row.get("step") or 0 for row in read_rows(folder.metrics)), default=0) if known else 0
        quiet = dict.fromkeys(("silent", "disable_job_creation"), True) | {"finish_timeout_raises": False}
        private = ("disable_git", "disable_code", "x_disable_meta", "x_disable_stats", "x_disable_machine_info")
        told: dict[str, Any] = {**quiet, **dict.fromkeys(private, True), "console": "off"}
        settings = wandb.Settings(**told, init_timeout=_PATIENCE_S, finish_timeout=_PATIENCE_S)
        about = {key: value for key, value in to_dict(config).items() if key not in _OWN_SECTIONS}
        try:
            with self._given_up_on_failure(), _nobody_to_ask():
                folder.wandb.mkdir(parents=True, exist_ok=True)
                where: dict[str, Any] = {"project": project, "name": config.run.name, "dir": str(folder.root)}
                self._run = wandb.init(**where, id=name, resume="allow", config=about, settings=settings)
                write_json(folder.wandb / "run.json", {"id": name, "project": project})
        except wandb.errors.UsageError as error:
            raise UserError(f"run.wandb: {error}\nor write files only: WANDB_MODE=offline") from error

    def write(self, step: int, scalars: dict[str, float]) -> None:
        if self._run is not None and step > self._done:
            with self._given_up_on_failure():
                self._run.log(scalars, step=step)

    def close(self) -> None:
        if self._run is not None:
            with self._given_up_on_failure():
                self._run.finish()

    @contextmanager
    def _given_up_on_failure(self) -> Iterator[None]:
        from wandb.errors import UsageError

        try:
            yield
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever its client raises, the run goes on
            self._run = None
            told = str(error).splitlines() or [""]
            self._say(f"run.wandb: given up, the run goes on without: {type(error).__name__}: {told[0]}")


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Hide standard input: on a terminal W&B would ask for a key, and nobody sits at a rank's terminal."""
    with open(os.devnull, encoding="utf-8") as nothing:
        usual, sys.stdin = sys.stdin, nothing
        try:
            yield
        finally:
            sys.stdin = usual


class Readings:
    """The monitors' readings of all nodes' GPUs, by window. The monitor of rank 0's node collects them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._changed()

    def _changed(self) -> int | None:
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return None

    def new(self) -> dict[str, float]:
        """Name -> mean and lowest of each node since the last call; empty until a window has ended."""
        changed = self._changed()
        if changed == self._seen:
            return {}
        self._seen = changed
        return {
            f"gpu/{node}/{name}/{which}": value
            for node, readings in facts_in(self._path).items()
            for name, both in (readings.items() if isinstance(readings, dict) else ())
            for which, told in zip(("mean", "lowest"), both if isinstance(both, list) else (), strict=False)
            if (value := amount({which: told}, which)) is not None
        }
