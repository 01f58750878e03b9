"""A job before it is in the queue: its checks, a snapshot, a batch script by submitit. Then it is followed."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import sys
import time
import unicodedata
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.config import Config
from configs.errors import UserError
from configs.load import dump
from configs.own import is_own
from configs.schema.slurm import SlurmSection
from launch.hooks import refuse_written_down
from launch.look.run_folder import JOB_FILE, outcomes
from slurm.ask import ask
from slurm.look import queue
from slurm.minutes import minutes
from slurm.submit import limits, snapshot
from trainer.host.arguments import typed
from trainer.host.locks import lock
from trainer.host.terminal import say
from trainer.life import attempts as life
from trainer.life.events import read_events
from trainer.life.folder import RunFolder, write_json
from trainer.life.rows import amount, facts_in, text
from trainer.preflight import Problem, check, problems_of

_POLL_S = 2.0
_WITHOUT_GPUS = 2  # processes on a node, as in `launch run`
_BY_NAME = (
    *("partition", "account", "qos", "time", "cpus_per_task", "mem", "constraint", "exclude", "nodelist"),
    *("dependency", "mail_type", "mail_user", "comment"),
)


class Submission:
    """A config and a request, and the batch script that they make."""

    def __init__(self, config: Config, request: SlurmSection) -> None:
        run_dir = str(Path(config.run_dir).absolute())  # the job may start in another folder
        run = config.run.model_copy(update={"dir": run_dir})  # a wrong path is a problem, reported with the others
        self.config = config.model_copy(update={"run": run, "slurm": request})
        self.request, self.folder = request, RunFolder(Path(run_dir))
        self.place = self.folder.root / "slurm"
        self.configs = {"config.yaml": dump(self.config)}
        self.own = [name for name in (config.task.name, config.model.name) if is_own(name)]
        self.snapshot = snapshot.place(self.place, self.configs, self.own)

    @property
    def config_path(self) -> str:
        """The path of the config that the job reads, quoted for the shell."""
        return shlex.quote(str(self.snapshot / "config.yaml"))

    @property
    def processes(self) -> int:
        """The number of processes on each node."""
        return self.request.gpus_per_node or _WITHOUT_GPUS

    def problems(self, paths: bool) -> list[Problem]:
        """All problems that can be known before the queue. Changes no file. `paths`: also check the nodes' paths."""
        if self.request.gpus_per_node is None:
            text = "how many GPUs has a node? --gpus-per-node 8 (or slurm.gpus_per_node; 0: ranks on the CPU)"
            return [Problem(text)]
        found = problems_of(
            lambda: refuse_written_down("slurm.webhook", self.request.webhook),
            lambda: refuse_written_down("monitor.webhook", self.config.monitor.webhook),
            self._check_time,
            self._check_words,
            self._check_place,
        )
        here = (
            self.request.container is None and self.request.python is None
        )  # else packages installed here tell nothing
        found += check(self.config, self.request.nodes * self.processes, self.folder, paths, packages=here)
        return found or problems_of(self._check_saves)

    def _check_time(self) -> None:
        r = self.request
        limit = minutes(r.time) if r.time is not None else None
        if limit is not None and limit * 60 <= r.warning_s:
            raise UserError(f"time {r.time}: the warning comes slurm.warning_s={r.warning_s} before, so at once")

    def _check_words(self) -> None:
        """Raise UserError for a word with a line break: the rest would no longer belong to the `#SBATCH` option."""
        words = {"run.name": self.config.run.name, "run.dir": str(self.place)}
        words |= {f"slurm.{name}": str(getattr(self.request, name)) for name in _BY_NAME}
        words |= {f"slurm.sbatch: {name}": f"{name}={value}" for name, value in self.request.sbatch.items()}
        for key, word in words.items():
            if not word.isprintable() and any(unicodedata.category(c) == "Cc" for c in word):
                raise UserError(f"{key}: {word!r} has a line break or another control character: sbatch takes none")

    def _check_place(self) -> None:
        kind = limits.filesystem(self.folder.root)
        if kind in limits.IN_MEMORY:
            raise UserError(f"run.dir: {self.folder.root} lies in this machine's memory ({kind}): no node sees it")
        if "\\" in str(self.place):
            raise UserError(f"run.dir: {self.folder.root}: Slurm takes no backslash in the path of an output")
        if ":" in str(self.place) and self.request.snapshot:
            raise UserError(f"run.dir: {self.folder.root}: PYTHONPATH takes no colon: another path, or --no-snapshot")

    def _check_saves(self) -> None:
        """Check that the warning leaves time for a save as slow as the slowest in this folder."""
        saved = [amount(e, "seconds") or 0.0 for e in read_events(self.folder) if e["event"] == "saved"]
        if saved and max(saved) > self.request.warning_s:
            raise UserError(
                f"a save into {self.folder.root} took {max(saved):.0f} s, and the warning comes "
                f"slurm.warning_s={self.request.warning_s} before the end: give it {max(saved) * 2:.0f}"
            )

    def parameters(self) -> dict[str, Any]:
        """The request under submitit's names."""
        r = self.request
        found: dict[str, Any] = {name: value for name in _BY_NAME if (value := getattr(r, name)) is not None}
        if r.gpus_per_node:
            found["gpus_per_node"] = r.gpus_per_node
        found |= {
            "job_name": self.config.run.name,
            "nodes": r.nodes,
            "time": r.time,  # given even when None: submitit's default is 5 minutes
            "ntasks_per_node": 1,
            "signal_delay_s": r.warning_s,
            "stderr_to_stdout": True,
            "wckey": None,  # submitit's own would be refused where the site checks keys
        }
        more: dict[str, Any] = {"requeue": True, "output": self.output(), **r.sbatch}
        if r.reservation is not None:
            more["reservation"] = r.reservation
        return _as_sbatch_reads(found) | {
            "setup": self._setup(),
            "use_srun": False,
            "additional_parameters": _as_sbatch_reads(more),
        }

    def output(self, number: str = "%j") -> str:
        """Where the job's output goes, in sbatch's form. sbatch replaces `%j` and the like; other `%` are doubled."""
        return f"{str(self.place).replace('%', '%%')}/{number}_0_log.out"

    def _setup(self) -> list[str]:
        # Under `--export=NONE` srun would hide these variables from the tasks, above all the snapshot's path.
        lines = ["export SLURM_EXPORT_ENV=ALL", *self.request.setup]
        if self.request.snapshot:
            # SAFEPATH: the folder where the job starts may hold another Muster, such as the working tree.
            path = shlex.quote(str(self.snapshot)) + "${PYTHONPATH:+:$PYTHONPATH}"
            lines += [f"export PYTHONPATH={path} PYTHONSAFEPATH=1"]
        # Slurm's signals that end a job also reach this shell, which must still run what follows srun.
        return [*lines, "trap : TERM"]

    def _srun(self) -> list[str]:
        r = self.request
        # Without --kill-on-bad-exit a node that is left alone would wait for the others. One log holds all output.
        words = ["srun", "--unbuffered", "--kill-on-bad-exit=1", "--output=all"]
        if r.cpus_per_task is not None:
            words += [f"--cpus-per-task={r.cpus_per_task}"]
        if r.container is not None:
            words += [f"--container-image={r.container}"]
        return words + r.srun

    def command(self) -> str:
        """What srun starts on each node, and what follows on the first node."""
        r = self.request
        inside = r.python or ("python" if r.container else sys.executable)
        outside = sys.executable if r.container else inside
        job = f"{shlex.join([*self._srun(), inside, '-m', 'slurm', 'job'])} {self.config_path} --nproc {self.processes}"
        # With `wait`, as a shell handles no SIGTERM while a foreground command runs, and srun can outlive KillWait.
        return f"{job} & wait $!\n{shlex.join([outside, '-m', 'slurm', 'after'])} {self.config_path} --code $?"

    def script(self) -> str:
        """The exact text of the batch script."""
        from submitit.slurm.slurm import _make_sbatch_string

        text: str = _make_sbatch_string(self.command(), self.place, **self.parameters())
        return text

    def submit(self) -> str:
        """Submit the job; return its number. Raises UserError when another job has the folder, or Slurm refuses."""
        with _only_one(self.place):
            self.refuse_living()
            snapshot.take(self.snapshot, self.configs, self.request.snapshot, self.own)
            number = self._sbatch()
            self.note(number)
        return number

    def refuse_living(self) -> None:
        """Raise UserError when a living job has the run folder."""
        other = self.holder()
        if other is not None and state(other) is not None:
            raise UserError(f"{self.folder.root}: job {other} has it; end it first: {typed('slurm stop', other)}")

    def holder(self) -> str | None:
        """The job that got the run folder last. With slurm.requeue=chain each life has its own number."""
        return text(facts_in(self.folder.root / JOB_FILE), "job")

    def note(self, number: str) -> None:
        """Record which job has the run folder."""
        self.place.mkdir(parents=True, exist_ok=True)
        write_json(self.folder.root / JOB_FILE, {"job": number, "time_s": time.time(), "user": _user()})

    def _sbatch(self) -> str:
        """Call sbatch. submitit would pickle a function by its place in the working tree, and cut a path at `%`."""
        script = self.place / f".submission-{uuid.uuid4().hex}.sh"
        script.write_text(self.script(), encoding="utf-8")
        try:
            told = ask("sbatch", "--parsable", str(script))  # sacct remembers the script's path
            number = told.strip().partition(";")[0]
            script.rename(self.place / f"{number}_submission.sh")
        finally:
            script.unlink(missing_ok=True)
        return number

    def follow(self, number: str) -> int:
        """Show the job's output until it is over; return the run's outcome. Ctrl-C leaves the job running."""
        shown = 0
        try:
            while any_alive(number):
                shown = _show(self.log(number), shown)
                time.sleep(_POLL_S)
            _show(self.log(number), shown)
        except KeyboardInterrupt:
            say(f"\njob {number} goes on without being watched")
            return life.STOPPED
        following = self.holder()
        if following is not None and following != number:
            return self.follow(following)
        return self.outcome()

    def outcome(self) -> int:
        """The exit code of the run, once its job is over."""
        ended = outcomes(self.folder)  # under any number: a task of an array has its own
        return ended[-1].exit_code if ended else life.FAILED

    def log(self, number: str) -> Path:
        """Where the job's output goes."""
        return self.place / f"{number}_0_log.out"


def _as_sbatch_reads(options: dict[str, Any]) -> dict[str, Any]:
    """Options with each backslash doubled: in a `#SBATCH` line sbatch removes one of two, even inside quotes."""
    return {k: v.replace("\\", "\\\\") if isinstance(v, str) else v for k, v in options.items()}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in a container
        return str(os.getuid())


@contextlib.contextmanager
def _only_one(place: Path) -> Iterator[None]:
    """Make two submissions of one run that happen at the same time wait for each other."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only files open for writing
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {place.parent}: {error.strerror or error}") from error
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def state(number: str) -> str | None:
    """PENDING, RUNNING and so on; None once the job is over. Raises UserError while Slurm does not answer."""
    answer = queue.of([number])
    if answer.silent is not None:
        raise UserError(answer.silent)
    job = answer.jobs.get(number)
    return job.state if job is not None else None


def any_alive(*numbers: str) -> bool:
    """Whether one of the jobs lives. Without an answer they count as living: only the controller may be down."""
    answer = queue.of(numbers)
    return answer.silent is not None or any(number in answer.jobs for number in numbers)


def _show(log: Path, shown: int) -> int:
    """Print what is new in the log; return where it ends now."""
    try:
        with open(log, "rb") as file:
            file.seek(shown)
            new = file.read()
    except OSError:
        return shown  # the log does not exist yet
    sys.stdout.write(new.decode(errors="replace"))
    sys.stdout.flush()
    return shown + len(new)
