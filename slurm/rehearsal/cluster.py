"""A real Slurm cluster on this machine, to rehearse on: `python -m slurm cluster up|down|status`.

Each node is a set of Linux namespaces: its own host name, address, process table and /etc/hosts, on shared files. Where
namespaces are not allowed, the nodes are plain daemons that differ by their ports. The GPUs are pretended.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from configs.errors import UserError
from launch.run.processes import kill
from slurm.rehearsal.config import MARK, MOST_NODES, Home, Settings, slurm_conf, write_files
from slurm.rehearsal.net import (
    add_bridge,
    add_node,
    hosts_add,
    hosts_remove,
    namespaces_allowed,
    node_command,
    one_at_a_time,
    remove_all,
)
from trainer.host.arguments import typed
from trainer.host.environment import PATH
from trainer.host.inherited import CLUSTERS, without_job

# program -> the package of Debian and Ubuntu that has it
_NEEDED = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
_ACCOUNTING = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
    "my_print_defaults": "mariadb-client-core",  # mariadb's installer calls it
}
_APT = "apt-get install --no-install-recommends"
_MAX_SOCKET_PATH = 107  # of a unix socket
_SLOTS = 32
NODES, GPUS = 2, 4  # unless the command line tells
_PATIENCE_S = 180.0  # for a daemon that lives: a busy machine may take a minute where another takes a second
_DATABASE_FLAGS = ("--skip-networking", "--skip-grant-tables", "--skip-log-bin", "--innodb-buffer-pool-size=64M")


def default_home() -> Home:
    """The default folder of a cluster: one per user."""
    return Home(Path(tempfile.gettempdir()) / f"muster-cluster-{os.getuid()}")


def how_to(verb: str, home: Home) -> str:
    """The command that a person types for this cluster."""
    return typed(f"slurm cluster {verb}") + ("" if home == default_home() else f" --dir {home.root}")


def missing() -> str | None:
    """Why no cluster can be started here, in one line; None if one can."""
    packages = [package for program, package in _NEEDED.items() if not _which(program)]
    if packages:
        return f"Slurm is not installed here: {_APT} {' '.join(packages)}  (or: make slurm-deps)"
    if os.getuid() != 0:
        return "a cluster of one's own needs root: Slurm's daemons start jobs as other users"
    return None


def _which(program: str) -> str | None:
    return shutil.which(program, path=_path())


def _path() -> str:
    return (PATH.read(os.environ) or "/usr/bin:/bin") + ":/usr/sbin:/sbin"


def no_accounting() -> str:
    """What this machine lacks for accounting, as the line that installs it; empty if nothing is missing."""
    packages = [package for program, package in _ACCOUNTING.items() if not _which(program)]
    return f"{_APT} {' '.join(packages)}" if packages else ""


class Cluster:
    """A cluster in its own folder. A process belongs to it when its environment holds that folder."""

    def __init__(self, home: Home, settings: Settings) -> None:
        self.home, self.settings = home, settings
        self.environment = {
            **{name: value for name, value in without_job(os.environ).items() if name != CLUSTERS},  # a real one
            "PATH": _path(),
            "SLURM_CONF": str(home.conf),
            "MYSQL_UNIX_PORT": str(home.database_socket),
            MARK: str(home.root),
        }

    # ---- processes --------------------------------------------------------------------------------------------------

    def alive(self, name: str) -> psutil.Process | None:
        """The process that `_spawn` started under this name; None if it has ended."""
        try:
            process = psutil.Process(int(self.home.pid_file(name).read_text()))
            zombie = process.status() == psutil.STATUS_ZOMBIE
            return process if not zombie and process.environ().get(MARK) == str(self.home.root) else None
        except (OSError, ValueError, psutil.Error):
            return None

    def _spawn(self, name: str, *command: str) -> None:
        """Start a daemon, detached; its output goes to log/NAME.out."""
        with open(self.home.log(name), "ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.home.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.home.pid_file(name).write_text(str(process.pid))
        _until(5.0, lambda: self.alive(name) is not None or process.poll() is not None)  # the environment shows late

    def _stop(self, name: str, number: signal.Signals) -> None:
        process = self.alive(name)
        if process is not None:
            for sign, patience_s in ((number, 30.0), (signal.SIGKILL, 10.0)):
                process.send_signal(sign)
                if _until(patience_s, lambda: self.alive(name) is None):
                    break
        self.home.pid_file(name).unlink(missing_ok=True)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a client of this cluster, such as sinfo."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    # ---- up ---------------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Start what does not run: everything, or the nodes and daemons that died. Raises UserError with the log.

        Without a working database the cluster has no accounting.
        """
        self._start_munge()
        if self.settings.accounting:
            try:
                self._start_accounting()
            except UserError as error:
                self._do_without_accounting(str(error))
        if self.settings.isolated:
            add_bridge(self.settings)
        else:
            hosts_add(self.settings)
        if self.alive("slurmctld") is None:
            self._spawn("slurmctld", "slurmctld", "-D")
        for number in range(1, self.settings.nodes + 1):
            self.start_node(number)
        self._wait("slurmctld", lambda: len(self.ready_nodes()) == self.settings.nodes, "the nodes did not come up")

    def start_node(self, number: int) -> None:
        """Start a node, unless it runs."""
        name = f"node{number}"
        if self.alive(name) is None:
            if self.settings.isolated:
                add_node(self.settings, number)
            self._spawn(name, *node_command(self.home, self.settings, number))

    def kill_node(self, number: int) -> None:
        """Crash a node and everything that runs on it. `up` brings it back."""
        self._stop(f"node{number}", signal.SIGKILL)

    def states(self) -> dict[str, str]:
        """Node name -> state in Slurm's words, e.g. idle, mixed, down*; empty when the controller does not answer."""
        done = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T")
        return dict(line.split(None, 1) for line in done.stdout.splitlines() if " " in line)

    def ready_nodes(self) -> list[str]:
        return [name for name, state in self.states().items() if state in ("idle", "allocated", "mixed", "completing")]

    def _wait(self, daemon: str, ready: Callable[[], bool], what: str) -> None:
        """Wait until `ready`. Give up at once when the daemon has died."""
        if not _until(_PATIENCE_S, lambda: ready() or self.alive(daemon) is None) or self.alive(daemon) is None:
            raise UserError(f"{what}; see {self.home.root / 'log'} (to clear away: {how_to('down', self.home)})")

    def _start_munge(self) -> None:
        home = self.home
        if self.alive("munged") is not None:
            return
        key = home.root / "munge.key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(128))
        for stale in (home.root / "run").glob("munge.sock*"):
            stale.unlink()
        files = {"key-file": key, "socket": home.munge_socket, "pid-file": home.root / "run/munged.daemon.pid"}
        files |= {"seed-file": home.root / "munge.seed", "log-file": home.root / "log/munged.log"}
        flags = [f"--{flag}={path}" for flag, path in files.items()]
        self._spawn("munged", "munged", "--foreground", "--force", *flags)
        self._wait("munged", home.munge_socket.exists, "munged did not start")

    def _start_accounting(self) -> None:
        home = self.home
        if self.alive("slurmdbd") is not None:
            return
        data = home.root / "mysql"
        if self.alive("mariadbd") is None:
            if not (data / "mysql").is_dir():
                self._make_database(data)
            flags = [*_DATABASE_FLAGS, "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0"]
            flags += [f"--datadir={data}", f"--socket={home.database_socket}"]
            pid_file = f"--pid-file={home.root}/run/mariadbd.daemon.pid"
            self._spawn("mariadbd", "mariadbd", "--no-defaults", "--user=root", pid_file, *flags)
            self._wait("mariadbd", lambda: _listens(home.database_socket), "mariadbd did not start")
        self._spawn("slurmdbd", "slurmdbd", "-D")
        listed = lambda: self.run("sacctmgr", "-n", "list", "cluster").returncode == 0  # noqa: E731
        self._wait("slurmdbd", listed, "slurmdbd did not start")
        if not self.run("sacctmgr", "-n", "list", "cluster", "rehearsal").stdout.strip():
            self.run("sacctmgr", "-i", "-Q", "add", "cluster", "rehearsal")

    def _make_database(self, data: Path) -> None:
        install = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}"]
        done = self.run(*install, "--auth-root-authentication-method=normal", "--skip-test-db")
        told, log = done.stdout + done.stderr, self.home.log("mariadb-install")
        log.write_text(told)
        if done.returncode:
            lines = [line.strip() for line in told.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            said = next((line for line in lines if "error" in line.lower()), lines[-1])  # advice and addresses follow
            raise UserError(f"mariadb-install-db: {said}; see {log}")

    def _do_without_accounting(self, why: str) -> None:
        for daemon in ("slurmdbd", "mariadbd"):
            self._stop(daemon, signal.SIGKILL)
        self.settings = replace(self.settings, accounting=False, no_accounting=why)
        self.home.write_settings(self.settings)
        self.home.conf.write_text(slurm_conf(self.home, self.settings))

    # ---- down -------------------------------------------------------------------------------------------------------

    def down(self) -> None:
        """End every process of the cluster, and remove its folder and what it added to this machine."""
        for name in self.settings.names:
            self._stop(name, signal.SIGKILL)
        for daemon in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._stop(daemon, signal.SIGKILL)
        self._kill_rest()
        if self.settings.isolated:
            remove_all(self.settings)
        else:
            hosts_remove(self.settings)
        shutil.rmtree(self.home.root)

    def _kill_rest(self) -> None:
        """Kill what is left: jobs on plain nodes outlive their slurmd. All of these processes carry the mark."""
        kill([p for p in psutil.process_iter() if p.pid != os.getpid() and self._is_ours(p)])

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == str(self.home.root)
        except psutil.Error:
            return False


def _until(patience_s: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def find(home: Home) -> Cluster | None:
    """The cluster of this folder, running or not; None when there is none."""
    settings = home.settings()
    return Cluster(home, settings) if settings is not None else None


@one_at_a_time()
def start(
    home: Home, nodes: int | None = None, gpus: int | None = None, plain: bool = False, **changes: int | bool
) -> Cluster:
    """Start a cluster, or the missing parts of an existing one. Raises UserError when this machine cannot run one, or
    when the existing one has another size than the arguments ask for."""
    cluster = find(home)
    if cluster is not None:
        _check_size(cluster, nodes, gpus)
    how_many, with_gpus = NODES if nodes is None else nodes, GPUS if gpus is None else gpus
    if cluster is None:
        _check(home, how_many, with_gpus)
    why = missing()
    if why is not None:
        raise UserError(why)
    cluster = cluster or _make(home, how_many, with_gpus, not plain and namespaces_allowed(), changes)
    cluster.up()
    return cluster


def _make(home: Home, nodes: int, gpus: int, isolated: bool, changes: dict[str, int | bool]) -> Cluster:
    """Write the cluster's files. Nothing runs yet."""
    if not isolated and nodes > MOST_NODES:
        raise UserError(f"--nodes {nodes}: at most {MOST_NODES} plain nodes")
    settings = Settings(
        nodes=nodes,
        gpus=gpus,
        cpus=max(8, 2 * gpus),  # pretended as well: Slurm counts them, and binds nothing to them
        memory_mib=16000,
        isolated=isolated,
        accounting=not no_accounting(),
        no_accounting=no_accounting(),
        slot=_free_slot(),
        host=socket.gethostname().split(".")[0],
        **changes,  # type: ignore[arg-type]
    )
    home.root.mkdir(parents=True, exist_ok=True)
    home.write_settings(settings)
    write_files(home, settings)
    return Cluster(home, settings)


def _check_size(cluster: Cluster, nodes: int | None, gpus: int | None) -> None:
    """Raise UserError when the arguments ask for another size than the cluster has."""
    s, home = cluster.settings, cluster.home
    if nodes not in (None, s.nodes) or gpus not in (None, s.gpus):
        raise UserError(
            f"{home.root} holds a cluster of {s.nodes} node(s) with {s.gpus} GPU(s) each: "
            f"{how_to('down', home)}, then up again"
        )


def _check(home: Home, nodes: int, gpus: int) -> None:
    if not 1 <= nodes <= 250:
        raise UserError(f"--nodes {nodes}: 1 to 250 nodes")
    if not 0 <= gpus <= 64:
        raise UserError(f"--gpus {gpus}: 0 to 64 GPUs a node")
    longest = home.root / f"spool/node{nodes}/node{nodes}_{10**8}.{2**32}"  # a socket of Slurm's, for a step of a job
    if len(str(longest)) > _MAX_SOCKET_PATH or " " in str(home.root):
        raise UserError(f"--dir {home.root}: a shorter path without spaces is needed")
    if home.root.exists() and (not home.root.is_dir() or any(home.root.iterdir())):
        raise UserError(f"--dir {home.root}: is there already, and holds no cluster")


def _free_slot() -> int:
    """A number for ports and addresses that no other cluster of this machine uses."""
    for slot in range(_SLOTS):
        probe = Settings(1, 0, 1, 1, True, False, slot, "")
        taken = Path(f"/sys/class/net/{probe.bridge}").exists()
        if not taken and all(_free(port) for port in (probe.port, probe.database_port, probe.port + 3)):
            return slot
    raise UserError(f"{_SLOTS} clusters run here already")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
