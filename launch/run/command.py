"""`python -m launch run CONFIG`: run this node's share of a run under supervision."""

from __future__ import annotations

from trainer.host.arguments import config_parser, take
from trainer.host.terminal import go_on_unheard
from trainer.life.stop import StopWish


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = config_parser("launch run", "Run a config on this node: checks, torchrun, restarts, stopping.")
    parser.add_argument("--nproc", type=int, metavar="N", help="processes; default: one per GPU, 2 without GPUs")
    options = take(parser, arguments)
    wish = StopWish()
    wish.listen()
    from launch.run.node import run_node

    go_on_unheard()

    return run_node(options.config, options.overrides, options.nproc, wish)
