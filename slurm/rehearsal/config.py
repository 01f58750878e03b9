"""The parts of a rehearsal cluster: its settings, kept in its folder, and the files that Slurm reads.

Each line of slurm.conf that is not obvious is there because something failed without it.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from configs.errors import UserError
from trainer.host.environment import MUSTER_PRETEND_GPUS
from trainer.life.folder import write_text

MARK = "MUSTER_CLUSTER"  # environment variable of a cluster's processes and jobs, with its folder
ACCOUNTED = "AccountingStorageType=accounting_storage/slurmdbd"
_PORTS = 64  # ports of one cluster, from `port` on

# Runs before each task, and Slurm sets the variables that it prints. A job can count its pretended GPUs and sees no
# GPU, even on a machine that has some.
_PROLOG = """\
#!/bin/sh
IFS=,
set -- $CUDA_VISIBLE_DEVICES
echo export {pretend}=$#
echo export CUDA_VISIBLE_DEVICES=
echo export {mark}={root}
"""


@dataclass(frozen=True)
class Settings:
    """How a cluster was started. It keeps these settings until `down`. `slot` differs between clusters here."""

    nodes: int
    gpus: int
    cpus: int
    memory_mib: int
    isolated: bool
    accounting: bool
    slot: int
    host: str
    requeue_delay_s: int = 5
    slurmd_timeout_s: int = 10
    kill_wait_s: int = 10
    grace_s: int = 10
    preempt_signal: bool = True
    no_accounting: str = ""  # why there is no accounting

    @property
    def port(self) -> int:
        return 17800 + _PORTS * self.slot

    @property
    def database_port(self) -> int:
        return self.port + 1

    def node_port(self, number: int) -> int:
        """The port of a node's slurmd. Nodes with their own addresses can share one port."""
        return self.port + 2 + (0 if self.isolated else number)

    @property
    def bridge(self) -> str:
        return f"muster{self.slot}"

    def namespace(self, number: int) -> str:
        return f"muster{self.slot}-node{number}"

    def link(self, number: int) -> str:
        return f"mst{self.slot}n{number}"

    def address(self, number: int) -> str:
        """A node's address. Number 0 is the controller."""
        return f"10.213.{self.slot}.{number or 254}" if self.isolated else "127.0.0.1"

    @property
    def names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]


MOST_NODES = _PORTS - 3


@dataclass(frozen=True)
class Home:
    """The folder of a cluster, and the paths in it."""

    root: Path

    @property
    def conf(self) -> Path:
        return self.root / "slurm.conf"

    @property
    def env(self) -> Path:
        return self.root / "env"

    @property
    def database_socket(self) -> Path:
        return self.root / "run/mysql.sock"

    @property
    def munge_socket(self) -> Path:
        return self.root / "run/munge.sock"

    @property
    def stepd(self) -> Path:
        return self.root / "slurmstepd"

    def pid_file(self, name: str) -> Path:
        return self.root / "run" / f"{name}.pid"

    def log(self, name: str) -> Path:
        return self.root / "log" / f"{name}.out"

    def settings(self) -> Settings | None:
        """The cluster's settings; None when there is no cluster."""
        path = self.root / "settings.json"
        try:
            found = json.loads(path.read_text())
            return Settings(**{f.name: found[f.name] for f in fields(Settings)})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path} was written by another version of Muster; take the cluster down with that"
            ) from None

    def write_settings(self, settings: Settings) -> None:
        write_text(self.root / "settings.json", json.dumps(asdict(settings), indent=1) + "\n")


def write_files(home: Home, s: Settings) -> None:
    """Write every file that the daemons and the clients of this cluster read."""
    for name in ("run", "log", "state", "spool", "dev"):
        (home.root / name).mkdir(parents=True, exist_ok=True)
    home.root.chmod(0o755)
    for gpu in range(s.gpus):
        (home.root / f"dev/nvidia{gpu}").symlink_to("/dev/null")
    home.conf.write_text(slurm_conf(home, s))
    gres = f"Name=gpu File={home.root}/dev/nvidia[0-{s.gpus - 1}]\n" if s.gpus else ""
    (home.root / "gres.conf").write_text(gres)
    names = [(s.address(0), s.host), *((s.address(i), name) for i, name in enumerate(s.names, start=1))]
    hosts = "\n".join(f"{address} {name}" for address, name in [("127.0.0.1", "localhost"), *names])
    (home.root / "hosts").write_text(hosts + "\n")
    _write_program(home.root / "prolog", _PROLOG.format(pretend=MUSTER_PRETEND_GPUS.name, mark=MARK, root=home.root))
    words = [sys.executable, "-I", str(Path(__file__).with_name("stepd.py"))]
    _write_program(home.stepd, f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    if s.accounting:
        conf = home.root / "slurmdbd.conf"
        conf.touch(mode=0o600)  # slurmdbd refuses a file that others can read
        conf.write_text(slurmdbd_conf(home, s))
    home.env.write_text(f"export SLURM_CONF={shlex.quote(str(home.conf))}\n")


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def slurm_conf(home: Home, s: Settings) -> str:
    d = home.root
    # A job in "high" takes the nodes of jobs in "low". Slurm signals those jobs at once: with the signal of their
    # --signal, or with SIGTERM where the site does not set this. GraceTime seconds later it kills and requeues them.
    lines = ["SlurmctldParameters=preempt_send_user_signal"] if s.preempt_signal else []
    if s.accounting:
        lines += [ACCOUNTED, "AccountingStorageHost=127.0.0.1", f"AccountingStoragePort={s.database_port}"]
        lines += [f"AccountingStoragePass={home.munge_socket}", "AccountingStorageTRES=gres/gpu"]
    gres = f" Gres=gpu:{s.gpus}" if s.gpus else ""
    for number, name in enumerate(s.names, start=1):
        host = "" if s.isolated else f" NodeHostname={s.host}"
        lines.append(
            f"NodeName={name}{host} NodeAddr={s.address(number)} Port={s.node_port(number)} "
            f"CPUs={s.cpus} RealMemory={s.memory_mib}{gres} State=UNKNOWN"
        )
    rest = "\n".join(lines)
    return f"""\
ClusterName=rehearsal
SlurmctldHost={s.host}({s.address(0)})
SlurmctldPort={s.port}
SlurmUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it can start again (Slurm's default: 120 s)
AuthInfo=socket={home.munge_socket},cred_expire={s.requeue_delay_s}
SlurmctldPidFile={d}/run/slurmctld.daemon.pid
SlurmdPidFile={d}/run/slurmd-%n.daemon.pid
SlurmctldLogFile={d}/log/slurmctld.log
SlurmdLogFile={d}/log/slurmd-%n.log
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool/%n
TaskProlog={d}/prolog
MailProg=/bin/true
MpiDefault=none
# no cgroups: they are seldom writable in containers
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=2
ReturnToService=2
# job ids never repeat from one cluster to the next: results are found by job id alone
FirstJobId={int(time.time()) % 60000000}
# short delays: a dead node is noticed in about 30 s; SIGKILL follows SIGTERM by KillWait
SlurmdTimeout={s.slurmd_timeout_s}
SlurmctldTimeout=10
KillWait={s.kill_wait_s}
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{rest}
PartitionName=low  Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={s.grace_s} MaxTime=INFINITE
PartitionName=high Nodes=ALL Default=NO PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""


def slurmdbd_conf(home: Home, s: Settings) -> str:
    return f"""\
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={s.database_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={home.munge_socket}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
LogFile={home.root}/log/slurmdbd.log
PidFile={home.root}/run/slurmdbd.daemon.pid
"""
