"""What runs on each node of a job, once: `srun --ntasks-per-node=1 python -m slurm job CONFIG [key=value ...]`.

The ranks of all nodes meet on the first node, at its name and a port made from the job's id. Nothing here falls back to
localhost: nodes that could not find each other would each train a separate copy.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import UserError
from slurm.job.again import names
from slurm.job.lives import Left, Life
from trainer.host.arguments import config_parser, take
from trainer.host.environment import (
    SLURM_NODEID,
    SLURM_STEP_NODELIST,
    SLURM_STEP_NUM_NODES,
    SLURM_STEP_NUM_TASKS,
    Job,
)
from trainer.host.node_name import node_name
from trainer.host.terminal import go_on_unheard, say
from trainer.life import attempts as life
from trainer.life.folder import RunFolder
from trainer.life.stop import SIGNALS, StopWish

if TYPE_CHECKING:
    from launch.run.node import Nodes

_OTHERS_BEGIN_S = 2.0  # until Python runs on every node of the step, and listens for signals
_FIRST_PORT, _PORTS = 20000, 10000  # below the ports that systems choose by themselves


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = config_parser("slurm job", __doc__)
    parser.add_argument("--nproc", type=int, metavar="N", help="processes a node; default: one per GPU, 2 without GPUs")
    options = take(parser, arguments)
    wish = StopWish()
    wish.listen()  # from now on a signal cannot end this process without a last word
    go_on_unheard()
    nodes = nodes_of_step(os.environ)
    os.environ["TERM"] = "dumb"  # srun --unbuffered gives a terminal, although the output is a file
    try:
        return _share(options, nodes, wish)
    except UserError as error:
        if nodes.count > 1:
            # srun ends the other tasks when this one leaves, and returns the highest exit code. A task that does not
            # listen yet would die of SIGTERM with 143, and a person's mistake would look like a failure.
            time.sleep(_OTHERS_BEGIN_S)
        here = f"{node_name()}: "  # tells which of many nodes
        raise UserError(str(error) if str(error).startswith(here) else f"{here}{error}") from error


def _share(options: argparse.Namespace, nodes: Nodes, wish: StopWish) -> int:
    """This node's share of the run, then its last word."""
    from configs.load import load  # imported late, like the next: it takes a while, and `main` listens already
    from launch.run.node import run_node

    folder = RunFolder(Path(load(options.config, options.overrides).run_dir))
    before, code = max(life.numbers(folder), default=-1), life.FAILED
    try:
        _find_names(nodes)
        _keep_caches_local()
        code = run_node(options.config, options.overrides, options.nproc, wish, nodes)
        return code
    except UserError:
        code = life.USER_ERROR
        raise
    finally:
        # When the first task leaves, Slurm ends the others. None of them may die of that while it leaves, too.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        try:
            Life.here(folder, os.environ).leave(Left(node_name(), code, before))
        except OSError as error:
            say(f"{node_name()} could not leave its last word: {error}", sys.stderr)


def nodes_of_step(environment: Mapping[str, str]) -> Nodes:
    """The nodes on which srun started this step. Raises UserError unless there is one task on each."""
    from launch.run.node import Nodes

    job, node_list = Job.read(environment), SLURM_STEP_NODELIST.read(environment)
    told = [v.read(environment) for v in (SLURM_STEP_NUM_NODES, SLURM_STEP_NUM_TASKS, SLURM_NODEID)]
    if job.id is None or job.step is None or node_list is None or None in told:
        raise UserError("slurm job runs inside a job: srun --ntasks-per-node=1 python -m slurm job CONFIG")
    count, tasks, index = (value or 0 for value in told)
    if tasks != count:
        raise UserError(f"{tasks} tasks on {count} node(s): slurm job wants one a node: srun --ntasks-per-node=1")
    # The port comes from the job's id, so that jobs that share a node do not meet. Array tasks have their own ids.
    port = _FIRST_PORT + int(job.id) % _PORTS
    start = f"{job.id}.{job.step}.{job.life}"
    return Nodes(count, index, _first_host(node_list), port, start)


def _first_host(node_list: str) -> str:
    found = names(node_list)
    if not found:
        raise UserError(f"scontrol cannot tell the nodes {node_list!r} apart")
    return found[0]


def _find_names(nodes: Nodes) -> None:
    """Check that nodes' names resolve: the rendezvous would wait minutes, and not tell which name is wrong."""
    if nodes.count == 1:
        return
    here = node_name()
    for name in dict.fromkeys((nodes.first, here)):
        try:
            socket.getaddrinfo(name, nodes.port)
        except OSError as error:
            raise UserError(f"{here}: the name of node {name} does not resolve here ({error})") from error


def _keep_caches_local() -> None:
    """Let each node write compiled code to its own disk: home directories are shared, and slow when all nodes write."""
    place = Path(tempfile.gettempdir()) / f"muster-cache-{os.getuid()}"
    for variable, folder in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        os.environ.setdefault(variable, str(place / folder))
