"""`python -m launch.monitor ORDERS`: the process that `launch run` starts on each node, beside the ranks."""

from __future__ import annotations

import json
import signal

from launch.monitor.journal import Taken
from launch.monitor.keeper import TAKEN, Orders
from launch.monitor.monitor import Monitor
from trainer.host.node_name import node_name
from trainer.host.parents import die_with_parent
from trainer.host.terminal import enter, go_on_unheard, say
from trainer.life.heartbeat import Heartbeats


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    go_on_unheard()
    # Slurm signals every process of a step. The monitor must stay until the ranks have saved and its launcher is done.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    orders = Orders(**json.loads(arguments[0]))
    if not die_with_parent(orders.launcher):
        return 1
    try:
        Monitor(orders, Heartbeats.open(orders.heartbeats)).run()
    except Taken as taken:
        say(f"{node_name()}: another monitor writes {taken}: this one leaves")
        return TAKEN
    return 0


if __name__ == "__main__":
    enter(main)
