"""Commands started as a person starts them, watched from outside by their files, their output and their processes."""

from __future__ import annotations

import getpass
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from launch.run.processes import kill
from tests.distributed import train
from tests.machine import patience
from trainer.host.node_name import node_name
from trainer.life.events import read_events
from trainer.life.folder import RunFolder
from trainer.life.rows import read_json, read_rows

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (sys.executable, "-m", "launch", "run")
PROCESS = (sys.executable, "-m", "trainer")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "trainer")
PHASE_S = 90.0  # to reach a phase on a busy machine; compiling takes longest
GONE_S = 100.0  # from a cause until nothing is left
_MARK = "MUSTER_TEST_RUN"  # an environment variable that marks a command's processes, whoever adopted them
_POLL_S = 0.01


class Watched:
    """The files that a run wrote. `folder` holds config.yaml."""

    def __init__(self, folder: Path) -> None:
        self.config = yaml.safe_load((folder / "config.yaml").read_text())
        self.folder = RunFolder(Path(self.config["run"]["dir"]))
        self.cache = Path(self.config["data"]["cache"])

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.folder.metrics)

    def step(self) -> int:
        """The newest step in the metrics."""
        return max((row["step"] for row in self.rows()), default=0)

    def events(self, *names: str) -> list[dict[str, Any]]:
        return [e for e in read_events(self.folder) if not names or e["event"] in names]

    def told_by(self, role: str, name: str) -> list[dict[str, Any]]:
        """Events of one writer on this node."""
        return [e for e in read_rows(self.folder.events / f"{node_name()}-{role}.jsonl") if e["event"] == name]

    def attempts(self) -> list[Path]:
        return sorted(self.folder.attempts.iterdir()) if self.folder.attempts.is_dir() else []

    def end(self, attempt: int = -1) -> dict[str, Any]:
        found = read_json(self.attempts()[attempt] / "end.json")
        assert found is not None, "no end.json"
        return dict(found)

    def committed(self) -> int:
        return max(self.folder.committed_steps(), default=0)

    def start_step(self, attempt: int) -> int:
        """The step from which an attempt went on."""
        return int(read_json(self.attempts()[attempt] / "start.json")["start_step"])


class Running(Watched):
    """One command, in its own session as from a terminal. `end`, or leaving the context, ends it for good."""

    def __init__(self, way: tuple[str, ...], folder: Path, *overrides: str, env: dict[str, str] | None = None) -> None:
        super().__init__(folder)
        self._mark = uuid.uuid4().hex
        self._output = folder / f"output-{self._mark[:6]}.txt"
        self.temporary = folder / f"tmp-{self._mark[:6]}"
        self.temporary.mkdir()
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MUSTER_", "SLURM_", "TORCHELASTIC_"))}
        ours = {_MARK: self._mark, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(self.temporary)}
        ours["TORCHINDUCTOR_CACHE_DIR"] = str(inductor_cache())
        with open(self._output, "w") as output:
            self.process = subprocess.Popen(
                [*way, str(folder / "config.yaml"), *overrides],
                cwd=ROOT,
                env={**clean, **ours, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_as_from_a_terminal,
            )

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    # ---- processes --------------------------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Every living process that this command started, directly or not, wherever it is in the tree."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def agent(self) -> psutil.Process:
        return next(p for p in psutil.Process(self.process.pid).children() if "launch.run.agent" in p.cmdline())

    def workers(self) -> dict[int, psutil.Process]:
        """Ranks whose program has begun: between fork and exec a worker still looks like its agent."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                rank = process.environ().get("RANK")
                if rank is not None and process.cmdline()[1:3] in (["-u", "-m"], ["-m", "trainer"]):
                    found[int(rank)] = process
            except psutil.Error:
                continue
        return found

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal as Slurm does: to every process of the step."""
        for process in self.processes():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def kill_rest(self) -> None:
        for _ in range(3):  # a dying process may just have started another
            kill(self.processes())
        self.process.wait(timeout=patience(5.0))

    # ---- waiting ----------------------------------------------------------------------------------------------------

    def wait_for(self, what: str, condition: Callable[[], Any], timeout_s: float = PHASE_S) -> None:
        deadline = time.monotonic() + patience(timeout_s)
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode} before {what}\n{self.output}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} within {timeout_s} s\n{self.output}")
            time.sleep(_POLL_S)

    def wait(self, timeout_s: float = GONE_S) -> int:
        """The exit code. Fails when the command does not end, or leaves something behind."""
        try:
            code = self.process.wait(timeout=patience(timeout_s))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {timeout_s} s\n{self.output}") from None
        return code

    def gone(self, within_s: float = 0.0) -> None:
        """Nothing is left: no process, no lease, no temporary folder of ours."""
        deadline = time.monotonic() + patience(within_s)
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        assert left == [], f"left behind: {left}\n{self.output}"


def _as_from_a_terminal() -> None:
    """Handle SIGHUP, although these tests may themselves run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextmanager
def running(
    way: tuple[str, ...], folder: Path, *overrides: str, env: dict[str, str] | None = None
) -> Iterator[Running]:
    """A command that is killed, with everything it started, when the block is left."""
    run = Running(way, folder, *overrides, env=env)
    try:
        yield run
    finally:
        run.kill_rest()


def finish(way: tuple[str, ...], folder: Path, *overrides: str, env: dict[str, str] | None = None) -> Running:
    """Run a command to a successful end."""
    with running(way, folder, *overrides, env=env) as run:
        assert run.wait() == 0, run.output
        run.gone(within_s=0.0 if way == LAUNCH else 5.0)
        return run


def finish_here(folder: Path, steps: int, size: int = 2) -> Watched:
    """Train to `steps` in forked ranks, which start in a tenth of a command's time."""
    run = Watched(folder)
    config = run.config
    config["train"] |= {"steps": steps, "time_limit_s": None}
    config["parallel"] = {**config.get("parallel", {}), "compile": False}
    assert train(config, size) == [0] * size
    return run


def samples_are_consecutive(run: Watched) -> None:
    """Check that every step of every attempt got its own samples, and that the counted steps go from 1 to the last."""
    batch = run.config["train"]["global_batch"]
    counted: dict[int, list[int]] = {}
    for attempt in run.attempts():
        steps: dict[int, list[int]] = {}
        for path in attempt.glob("samples-*.jsonl"):
            for row in read_rows(path):
                steps.setdefault(row["step"], []).extend(row["samples"])
        for step, samples in steps.items():
            expected = set(range(batch * (step - 1), batch * step))
            assert set(samples) <= expected, f"{attempt.name}, step {step}"
            assert len(set(samples)) == len(samples), f"{attempt.name}, step {step}"
            counted[step] = sorted(samples)
    last = run.step()
    assert sorted(counted) == list(range(1, last + 1))
    assert [n for step in sorted(counted) for n in counted[step]] == list(range(batch * last))


def clean_end(run: Running) -> None:
    """Check what holds after every end that the run reached by itself."""
    run.gone()
    assert not run.folder.lease.exists()
    assert not list(run.temporary.glob("muster-*"))


def inductor_cache() -> Path:
    """A cache of compiled code that lasts between test sessions, as PyTorch's own does."""
    return Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"


def write_words(folder: Path, files: int, words: int) -> Path:
    """Random text, made quickly; every file has the same length."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    vocabulary = ("def", "class", "return", "import", "self", "value", "for", "in", "if", "else", "while", "None")
    for number in range(files):
        (folder / f"{number:04d}.txt").write_text(" ".join(rng.choices(vocabulary, k=words)) + "\n")
    return folder
