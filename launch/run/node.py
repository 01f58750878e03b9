"""One node's share of a run: torchrun under a supervisor that takes the signals and leaves no process behind.

With several nodes there is a supervisor on each. They meet in the run folder. The first one holds the folder's lease,
and decides how an attempt ended where the ranks could not tell.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from configs.config import Config
from configs.errors import UserError
from configs.load import load
from launch.monitor.devices import count_visible
from launch.monitor.keeper import Keeper
from launch.run.processes import kill
from trainer.host import clock, environment, processors
from trainer.host.console import Console
from trainer.host.environment import LOOPBACK, FromLauncher, Job
from trainer.host.held import HeldFolder
from trainer.host.memory import check_memory
from trainer.host.node_name import node_name
from trainer.host.shadow import apart, python
from trainer.life import attempts as life
from trainer.life.attempts import End
from trainer.life.events import Events, read_events, tolerate_unwritable
from trainer.life.folder import RunFolder
from trainer.life.heartbeat import Heartbeats
from trainer.life.lease import Lease
from trainer.life.rows import read_rows, text
from trainer.life.stop import Kind, StopRequested, StopWish, write_request
from trainer.preflight import check, check_numbers, problems_of, refuse

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.1
_USER_ERROR_PATIENCE_S = 5.0
_END_PATIENCE_S = 20.0  # to wait for an end that another node writes, on a filesystem that caches


@dataclass(frozen=True)
class Nodes:
    """How many nodes a run has, and which of them this is. The first one holds the run folder and decides."""

    count: int = 1
    index: int = 0
    first: str = ""  # the first node's name, at which the others meet it
    port: int = 0
    start: str = ""  # distinguishes this start from others on the same port

    @property
    def is_first(self) -> bool:
        return self.index == 0


def default_processes() -> int:
    """One process per visible GPU, or per GPU that a rehearsal cluster pretends to have; two where there is none."""
    pretended = environment.MUSTER_PRETEND_GPUS.read(os.environ)
    if pretended is not None:
        return pretended or 2
    return count_visible() or 2


def run_node(
    argument: str | None, overrides: list[str], processes: int | None, wish: StopWish, nodes: Nodes | None = None
) -> int:
    """Run a config on this node, one of `nodes`, until the end is decided. Returns the exit code. `wish` listens
    already.

    Raises UserError before anything starts.
    """
    nodes, console = nodes or Nodes(), Console(rank=0)
    try:
        with wish.at_once():  # on a slow filesystem the checks take minutes, and a stop must not wait
            config, processes = _checked(argument, overrides, processes, nodes)
    except StopRequested as request:
        console.say(f"stopped ({request.cause.word}) before anything began")
        if not nodes.is_first:  # e.g. the first node was refused, and Slurm ends the others; the first node tells why
            return life.FAILED
        return End("stopped", 0, None, request.cause.kind is Kind.REQUEUE, request.cause.word).exit_code
    folder = RunFolder(Path(config.run_dir))
    existed = folder.root.exists()
    command = [*([argument] if argument else []), *overrides]
    with HeldFolder.temporary("muster-run-") as local:
        lease: Lease | None
        if nodes.is_first:
            lease = Lease.take(folder, node_name(), max(life.numbers(folder), default=-1) + 1, console.say)
        else:
            patience_s = config.parallel.load_timeout_s  # the first node checks before it takes the lease
            lease = Lease.of_first_node(folder, nodes.first, node_name(), patience_s, wish.poll, console.say)
        if lease is None:
            return life.FAILED  # the first node's exit code, which is higher, tells why
        try:
            return Supervisor(config, folder, command, processes, wish, console, lease, local, nodes).run()
        finally:
            if nodes.is_first:
                lease.release()
                if not existed:
                    _remove_if_empty(folder.root)


def _checked(argument: str | None, overrides: list[str], processes: int | None, nodes: Nodes) -> tuple[Config, int]:
    """The config and this node's number of processes. Raises UserError that lists every mistake. Changes no file."""
    if processes is not None and processes < 1:
        raise UserError(f"--nproc {processes}: at least 1 process is needed")
    environment.check(os.environ)
    config = load(argument, overrides)
    here = processes or default_processes()
    folder, ranks = RunFolder(Path(config.run_dir)), here * nodes.count
    problems = check(config, ranks, folder) if nodes.is_first else check_numbers(config, ranks)
    refuse(problems + problems_of(lambda: check_memory(config, here, ranks)))
    return config, here


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # the folder holds a run
        folder.rmdir()


class Supervisor:
    """Starts the agent, passes stop requests on, and decides from the run folder how the attempt ended."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        command: list[str],
        processes: int,
        wish: StopWish,
        console: Console,
        lease: Lease,
        local: Path,
        nodes: Nodes,
    ) -> None:
        self.config, self.folder, self.command, self.processes = config, folder, command, processes
        self.nodes = nodes
        self.wish, self.console, self.lease = wish, console, lease
        self._local = local
        self.heartbeats = Heartbeats.make(processes)
        self.told = FromLauncher(
            launched=clock.began_s(),
            parent=os.getpid(),
            lease=lease.token,
            stop_request=local / "request",
            user_error=local / "user_error",
            failures=local / "failures",
            heartbeats=Path(self.heartbeats.path),
            clock=clock.booted_s(),
        )
        self.events = Events(folder, node_name(), "launcher")
        self.monitor = Keeper(config, folder, self.heartbeats, local, console, self.events)
        self._failures_told = 0
        self._agent_died = False
        self._threads = environment.OMP_NUM_THREADS.read(os.environ) or self._choose_threads()
        self._before = max(life.numbers(folder), default=-1)
        _adopt_orphans()

    def run(self) -> int:
        """Returns the exit code."""
        code = self._run()
        newest = max(life.numbers(self.folder), default=-1)
        if newest > self._before:
            self.events.attempt = newest
            self.events.write("left", code=code)  # until now this run had its GPUs
        return code

    def _run(self) -> int:
        """Start agents until an end is agreed. torchrun itself restarts workers; this restarts a killed agent."""
        for _ in range(self.config.run.max_restarts + 1):
            before = max(life.numbers(self.folder), default=-1)
            status = self._one_agent()
            if self.told.user_error.exists():
                return life.USER_ERROR
            if self.nodes.count > 1:
                return self._outcome_of_many(before, status)
            end = self._decide(before, status)
            if end.reason != "failed" or status >= 0 or self.wish.cause is not None:
                break
        return end.exit_code

    def _one_agent(self) -> int:
        self.monitor.start()
        agent = subprocess.Popen(self._agent_command(), env=self._environment(), start_new_session=True)
        deadline: float | None = None
        try:
            while agent.poll() is None:
                if self.wish.poll() is not None and deadline is None:
                    deadline = time.monotonic() + self.config.run.stop_grace_s
                    self._pass_on()
                if deadline is not None and time.monotonic() > deadline:
                    if not self.told.user_error.exists():
                        self.console.say(f"not stopped after {self.config.run.stop_grace_s:g} s: ended by force")
                        self.events.write("ended_by_force")
                    break
                if self.told.user_error.exists() and deadline is None:
                    deadline = time.monotonic() + _USER_ERROR_PATIENCE_S  # one rank gave up, and the others wait for it
                self._tell_failures()
                if self.monitor.poll():
                    break  # a hang: every rank's stack is written
                time.sleep(_POLL_S)
        finally:
            self._agent_died = (agent.poll() or 0) < 0  # by itself, not by the kill below
            agent.kill()
            status = agent.wait()
            self.monitor.stop()
            _kill_descendants()
        self._tell_failures()
        return status

    def _agent_command(self) -> list[str]:
        nodes = self.nodes
        torchrun = [f"--nnodes={nodes.count}", f"--nproc-per-node={self.processes}"]
        if nodes.count == 1:
            # Not --standalone: its ranks meet at the name of this host, which may not resolve.
            torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={LOOPBACK}:0", f"--local-addr={LOOPBACK}"]
            torchrun += ["--rdzv-id=muster", "--rdzv-conf=is_host=1"]
        else:
            # Given, not guessed from names: a node that guessed wrong would form a world of its own.
            meet = {"is_host": int(nodes.is_first), "join_timeout": int(self.config.parallel.load_timeout_s)}
            torchrun += ["--rdzv-backend=c10d", f"--rdzv-id={nodes.start}"]
            torchrun += [f"--rdzv-endpoint={nodes.first}:{nodes.port}", f"--local-addr={node_name()}"]
            torchrun += ["--rdzv-conf=" + ",".join(f"{key}={value}" for key, value in meet.items())]
        torchrun += [f"--max-restarts={self.config.run.max_restarts}", "--monitor-interval=0.2"]
        torchrun += [f"--log-dir={self._local}"]  # else torchrun makes a temporary folder, and leaves it
        return [*python(), "-m", "launch.run.agent", *torchrun, "-m", "trainer", *self.command]

    def _choose_threads(self) -> int:
        threads = processors.threads(self.processes, self.config.precision.deterministic)
        self.console.say(str(threads))
        return threads.each

    def _environment(self) -> dict[str, str]:
        unless_set = {  # also when set to nothing, as a job script does with values that Slurm did not give
            "TORCH_FR_BUFFER_SIZE": "2000",  # how many collectives are recorded, to report after a hang
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # an index then means the same GPU to CUDA, to NVML and to people
            "OMP_NUM_THREADS": str(self._threads),
        }
        # With the shared store, workers that restart in place would meet their dead predecessors' addresses.
        ours = {**self.told.environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        # PET_...: torchrun's defaults for options that are not given. An operator of Kubernetes may set them.
        theirs = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
        chosen = {name: value for name, value in unless_set.items() if not theirs.get(name)}
        return {**theirs, **chosen, **apart(), **ours}

    def _pass_on(self) -> None:
        cause = self.wish.cause
        assert cause is not None
        write_request(self.told.stop_request, cause)
        self._note("stop_passed_on", cause=cause.word)
        below = "\n" if sys.stdout.isatty() else ""  # ends rank 0's live line
        self.console.say(f"{below}stopping ({cause.word}): saving within two steps")

    def _note(self, event: str, **facts: Any) -> None:
        """Write an event with the life of the Slurm job. Its time cannot tell the life, as clocks may be set."""
        job = Job.read(os.environ)
        self.events.write(event, job=job.id, life=int(job.life), **facts)

    def _decide(self, before: int, status: int) -> End:
        """The end of the newest attempt. If nobody wrote one, it is written here as failed."""
        if not self.folder.root.is_dir():
            self.console.say(f"{self.folder.root} is gone: it was moved or removed while this ran")
            return End("failed", 0, None, requeue=False, cause="folder_gone")
        attempt = life.newest(self.folder)
        if attempt is None or attempt.number <= before:
            if self.wish.cause is not None and not status:
                return self._unwritten_end(status)  # the ranks left while they waited for each other
            self.console.say(f"the workers ended (status {status}) before an attempt began")
            return End("failed", 0, None, requeue=True, cause="start_failed")
        if self._agent_died:
            self.events.attempt = attempt.number
            self._note("agent_died", status=status)
            self.console.say(f"the agent died ({_cause(status)})")
        if attempt.end is None:
            end = self._unwritten_end(status)
            with tolerate_unwritable():  # a missing end means failed, too
                attempt.write_end(end)
            return end
        return attempt.end

    def _outcome_of_many(self, before: int, status: int) -> int:
        """This node's exit code with several nodes, after its agent is gone: a new agent could not meet the others."""
        if self._agent_died and not self.nodes.is_first:
            self._note("agent_died", status=status)
        if status < 0 or (status and self.nodes.is_first):
            return self._decide(before, status).exit_code if self.nodes.is_first else life.FAILED
        if status == 0 and max(life.numbers(self.folder), default=-1) <= before:
            if cause := StopWish(self.told.stop_request).poll():  # rank 0's node may have heard the request first
                self.wish.wish(cause)
            if self.wish.cause is not None:
                return self._unwritten_end(status).exit_code  # the ranks left while they waited for each other
            return life.USER_ERROR  # at once: rank 0 was on another node, which reported it; its end kills us
        end = self._hear(before)
        if end is not None:
            return end.exit_code
        return self._decide(before, status).exit_code if self.nodes.is_first else life.FAILED

    def _hear(self, before: int) -> End | None:
        """The end that rank 0 or the first node wrote. The files of another node may take a while to be visible."""
        deadline = time.monotonic() + _END_PATIENCE_S
        while time.monotonic() < deadline:
            attempt = life.newest(self.folder)
            if attempt is not None and attempt.number > before and (end := attempt.end) is not None:
                # The first node to leave ends the Slurm step on all nodes. The node with the lease must leave first.
                while not self.nodes.is_first and self.lease.is_held() and time.monotonic() < deadline:
                    time.sleep(_POLL_S)
                return end
            time.sleep(_POLL_S)
        return None

    def _unwritten_end(self, status: int) -> End:
        """The end of an attempt that wrote none: stopped by force as requested, or failed."""
        step, name = self.folder.newest_checkpoint()
        asked = self.wish.cause
        if asked is not None:
            return End("stopped", step, name, requeue=asked.kind is Kind.REQUEUE, cause=asked.word)
        return End("failed", step, name, requeue=True, cause="hang" if self.monitor.hang else _cause(status))

    def _tell_failures(self) -> None:
        """Record ranks that died since the last call as events, and print the first one's name. They belong to the
        attempt that is the newest now: torchrun's next one takes seconds to begin."""
        failures = read_rows(self.told.failures)[self._failures_told :]
        if not failures:
            return
        self._failures_told += len(failures)
        newest = max(life.numbers(self.folder), default=-1)
        self.events.attempt = attempt = newest if newest > self._before else None
        for failure in failures:
            self.events.write("rank_died", **failure)
        events = [e for e in read_events(self.folder) if e["event"] == "rank_failed" and e.get("attempt") == attempt]
        raised = [e for e in events if e.get("rank") is not None and text(e, "error") is not None]
        rank, why = _first_to_fall(failures, raised)
        self.console.end_live()
        path = self.folder.attempts / f"{attempt or 0:03d}"
        logs = f"\n  logs: {path}" if attempt is not None and path.is_dir() else ""
        self.console.say(f"rank {rank} failed: {why}{logs}")


def _first_to_fall(failures: list[dict[str, Any]], raised: list[dict[str, Any]]) -> tuple[int, str]:
    """The rank that failed first, and why. A rank that was killed without a word comes before ranks that raised: they
    met its silence. torchrun's own SIGTERM comes last."""
    told = {e["rank"] for e in raised}
    killed = [f for f in failures if f["rank"] not in told and f["exit_code"] < 0 and f["exit_code"] != -signal.SIGTERM]
    if raised and not killed:
        return raised[0]["rank"], str(raised[0]["error"]).splitlines()[0]
    first = (killed or failures)[0]
    return first["rank"], _cause(first["exit_code"])


def _cause(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit_code_{status}"


def _adopt_orphans() -> None:
    """Make workers whose agent dies our children, so that none is lost from sight (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_descendants() -> None:
    """Kill the whole tree below this process. Repeat, since a dying process may just have started another one."""
    while True:
        alive = [p for p in psutil.Process().children(recursive=True) if _is_alive(p)]
        if not alive:
            return
        kill(alive)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
