"""`python -m slurm cluster up|down|status`: a real Slurm cluster on this machine."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from slurm.rehearsal.cluster import GPUS, NODES, Cluster, default_home, find, how_to, start
from slurm.rehearsal.config import Home
from trainer.host.arguments import Parser, typed
from trainer.host.terminal import say


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=typed("slurm cluster"), description="A real Slurm cluster on this machine.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="up|down|status")
    up = verbs.add_parser("up", help="start it, or bring back nodes and daemons that died")
    up.add_argument("--nodes", type=int, metavar="N", help=f"how many nodes; default: {NODES}, or those it has")
    up.add_argument("--gpus", type=int, metavar="N", help=f"GPUs a node pretends to have; default: {GPUS}")
    up.add_argument("--plain", action="store_true", help="nodes as plain daemons, without namespaces")
    down = verbs.add_parser("down", help="stop it and remove all it left on this machine")
    status = verbs.add_parser("status", help="what runs; exit code 1 unless all of it does")
    for verb in (up, down, status):
        verb.add_argument("--dir", type=Path, metavar="DIR", help=f"its folder; default: {default_home().root}")
    return parser


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = _parser().parse_args(arguments)
    home = Home(options.dir.absolute()) if options.dir is not None else default_home()
    if options.verb == "up":
        began = time.monotonic()
        cluster = start(home, options.nodes, options.gpus, options.plain)
        tell(cluster)
        say(f"up in {time.monotonic() - began:.1f} s. Now:   . {home.env}")
        say(f"to stop:         {how_to('down', home)}")
        return 0
    found = find(home)
    if found is None:
        say(f"no cluster in {home.root}")
        return 0 if options.verb == "down" else 1
    if options.verb == "down":
        found.down()
        say(f"{home.root} is gone")
        return 0
    return tell(found)


def tell(cluster: Cluster) -> int:
    """Print what runs. Returns 1 unless everything runs."""
    s = cluster.settings
    kind = "namespaces, each with its own name, address and processes" if s.isolated else "plain daemons"
    say(f"{s.nodes} node(s) as {kind}; {s.gpus} pretended GPU(s) on each")
    daemons = ["munged", "slurmctld", *(["mariadbd", "slurmdbd"] if s.accounting else [])]
    dead = [name for name in daemons if cluster.alive(name) is None]
    states = cluster.states()
    for name in s.names:
        running = cluster.alive(name) is not None
        say(f"  {name:<8}{states.get(name, 'unknown'):<14}{'' if running else 'its daemon is dead'}".rstrip())
    for name in dead:
        say(f"  {name} is dead: {how_to('up', cluster.home)} brings it back")
    if not s.accounting:
        say(f"  no accounting (sacct): {s.no_accounting}")
    return 0 if not dead and len(cluster.ready_nodes()) == s.nodes else 1
