"""One writer per run folder. No torch.

`LEASE` names the process that runs the folder: the launcher, or rank 0 under bare torchrun. It is made with O_EXCL and
outlives restarts in place. A second start is refused while the holder lives; the lease of a dead one is taken over.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from configs.errors import UserError
from configs.files import NotAFile, read_regular
from trainer.host.clock import now_s, started_ticks
from trainer.host.environment import FromLauncher, Job
from trainer.host.inherited import without_job
from trainer.host.locks import lock
from trainer.life.folder import RunFolder
from trainer.life.rows import facts_in, moment, parsed, text, whole

_JOB_LIVES = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "REQUEUED", "REQUEUE_HOLD"}
_LARGEST_BYTES = 1 << 20
_FIRST_NODE_S = 60.0  # all nodes start at about the same time; after that it is said who is waited for
_REMOVE = "if you know that no run holds the folder, remove it"


def _self_description(node: str, attempt: int) -> dict[str, Any]:
    process, job = psutil.Process(), Job.read(os.environ)
    return {
        "token": uuid.uuid4().hex,
        "node": node,
        "pid": process.pid,
        "started_s": process.create_time(),
        "started_ticks": _started_ticks(process.pid),
        "boot_id": _boot_id(),
        "pid_namespace": _pid_namespace(),
        "job": job.id,
        "life": job.life,
        "step": job.step,
        "attempt": attempt,
        "time_s": now_s(),
    }


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _alive(holder: dict[str, Any], node: str) -> bool | None:
    """Whether the holder still runs; None when that cannot be known: its pid says nothing, and nor does Slurm."""
    known = alive_here(holder, node)
    return _job_alive(holder.get("job")) if known is None else known


def _job_alive(job: str | None) -> bool | None:
    """Whether Slurm still has the holder's job, which may also wait to be started again."""
    if not job or job == Job.read(os.environ).id:
        return None
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T"]
    try:
        environment = without_job(os.environ)  # with SQUEUE_PARTITION a job of another partition would look dead
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return False if "Invalid job id" in done.stderr else None  # forgotten, or nobody answers
    return any(state in _JOB_LIVES for state in done.stdout.split())


def alive_here(holder: dict[str, Any], node: str) -> bool | None:
    """By its job's life and its pid."""
    job = Job.read(os.environ)
    if job.id is not None and holder.get("job") == job.id and holder.get("life") != job.life:
        return False  # an earlier life of this very job: Slurm requeues it only once that has ended
    if holder.get("boot_id") != _boot_id():
        return False if holder.get("node") == node else None  # same node, rebooted; or another node
    if holder.get("pid_namespace") != _pid_namespace():
        return None  # another container of this machine: its pids mean nothing here
    pid, started_s = whole(holder, "pid"), moment(holder, "started_s")
    if pid is None or pid <= 0 or started_s is None:
        return None  # no lease of ours
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False  # it has ended, and its parent (in a container without an init, say) never waited for it
        # An hour later the pid may be another process's, which began at another time. That is compared in ticks since
        # the boot, as no change of a clock moves them. A lease of an earlier version has none.
        ticks = whole(holder, "started_ticks")
        return abs(process.create_time() - started_s) < 2 if ticks is None else _started_ticks(pid) == ticks
    except psutil.NoSuchProcess:
        return False


def _started_ticks(pid: int) -> int | None:
    try:
        return started_ticks(pid)
    except OSError:
        return None  # gone, or a system without /proc


class Lease:
    """Held from `take` to `release`."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token

    @classmethod
    def take(cls, folder: RunFolder, node: str, attempt: int, say: Callable[[str], None]) -> Lease:
        """Make the lease, or take over a dead holder's. Raises UserError while a holder lives or may live."""
        mine = _self_description(node, attempt)
        with writable(folder.root), _locked(folder.root):
            if os.path.lexists(folder.lease):
                holder = _holder(folder.lease)
                _refuse_living(folder, holder, node)
                who = f"pid {holder.get('pid')} on {holder.get('node')} is gone" if holder else "its LEASE names nobody"
                say(f"taking over {folder.root}: {who}")
                _clear_away(folder, text(holder, "token"), mine["token"])
            descriptor = os.open(folder.lease, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(mine, file)
                file.write("\n")
        return cls(folder.lease, mine["token"])

    @classmethod
    def of_first_node(
        cls,
        folder: RunFolder,
        first: str,
        node: str,
        patience_s: float,
        wished: Callable[[], object],
        say: Callable[[str], None],
    ) -> Lease | None:
        """The lease that the first node of this very job step took, for the others; it is not theirs to release.

        Also the proof that this node sees the same run folder. Raises UserError when it does not come; None when this
        node is `wished` to end first, as when the first one was refused and Slurm ends the others.
        """
        job = Job.read(os.environ)
        step = {"job": job.id, "step": job.step, "life": job.life}
        deadline = time.monotonic() + patience_s
        say_s = time.monotonic() + _FIRST_NODE_S
        while time.monotonic() < deadline:
            holder = facts_in(folder.lease)
            token = text(holder, "token")
            if token is not None and all(holder.get(key) == value for key, value in step.items()):
                return cls(folder.lease, token)
            if wished():
                return None
            if time.monotonic() > say_s:
                say_s = deadline
                say(f"{node} waits for {first} to take {folder.root}: it still checks, or they see different folders")
            time.sleep(0.1)
        raise UserError(
            f"{node}: {first} has not taken {folder.root} within {patience_s:g} s; "
            f"run.dir must be a folder that every node sees"
        )

    @classmethod
    def inherited(cls, folder: RunFolder) -> Lease | None:
        """The launcher's lease, for a worker it started; None under bare torchrun."""
        launcher = FromLauncher.read(os.environ)
        if launcher is None:
            return None
        if facts_in(folder.lease).get("token") != launcher.lease:
            raise UserError(f"{folder.lease}: the launcher that started this worker no longer holds the run folder")
        return cls(folder.lease, launcher.lease)

    def release(self) -> None:
        """Give the folder back. A lease that was taken over meanwhile is left alone."""
        if self.is_held():
            with suppress(OSError):  # on a disk that is read-only now: the next start sees that this process is gone
                self.path.unlink(missing_ok=True)

    def is_held(self) -> bool:
        """Whether it stands, as this one."""
        return bool(facts_in(self.path).get("token") == self.token)


def _holder(lease: Path) -> dict[str, Any]:
    """What the lease says; {} when its writer died while it wrote. Raises UserError for what no launcher made."""
    try:
        data = read_regular(lease, _LARGEST_BYTES)
    except NotAFile as error:
        raise UserError(f"{lease}: {error.strerror}; {_REMOVE}") from error
    found = parsed(data)
    if found is not None and not isinstance(found, dict):
        raise UserError(f"{lease}: it does not say who holds the run folder; {_REMOVE}")
    return found or {}


def _refuse_living(folder: RunFolder, holder: dict[str, Any], node: str) -> None:
    if not holder:
        return  # a holder that died while it wrote the lease
    alive = _alive(holder, node)
    who = f"pid {holder.get('pid')} on {holder.get('node')}" + (f", job {holder['job']}" if holder.get("job") else "")
    if alive:
        raise UserError(f"{folder.root}: already running ({who}); stop it first: touch {folder.stop}")
    if alive is None:
        raise UserError(
            f"{folder.root}: held by {who}, which cannot be asked from here;\n"
            f"if you know that it has ended, remove {folder.lease}"
        )


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Make the run folder; what the filesystem has against it is a person's to mend."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {folder}: {error.strerror or error}") from error


def _clear_away(folder: RunFolder, dead: str | None, mine: str) -> None:
    """Remove the lease of a dead holder. Where locks do not work, another start may have put its own lease there since
    we read: that one is put back. So it is renamed first, which is atomic on every filesystem."""
    taken = folder.lease.with_name(f"LEASE.dead-{mine}")
    try:
        os.rename(folder.lease, taken)
    except FileNotFoundError:
        raise UserError(f"{folder.root}: another start takes it over at this moment") from None
    holder = facts_in(taken)
    theirs = text(holder, "token") != dead
    if theirs:
        with suppress(FileExistsError):
            os.link(taken, folder.lease)
    taken.unlink()
    if theirs:
        raise UserError(f"{folder.root}: already running (pid {holder.get('pid')} on {holder.get('node')})")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Between looking at a dead lease and replacing it no second start may do the same."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, wait=True)  # where it holds: not on every filesystem, nor always between two nodes
        yield
    finally:
        os.close(descriptor)
