"""`python -m launch VERB ...`."""

from trainer.shadow import refuse_shadow

refuse_shadow()  # before any import that a folder of the user's could answer

import argparse  # noqa: E402
import sys  # noqa: E402

from configs.errors import UserError  # noqa: E402
from trainer import life  # noqa: E402
from trainer.arguments import config_parser, take  # noqa: E402


def run(arguments: list[str]) -> int:
    """Run a config on this node: checks, torchrun, restarts, stopping."""
    parser = config_parser("python -m launch run", run.__doc__ or "")
    parser.add_argument("--nproc", type=int, metavar="N", help="processes; default: one per GPU, 2 without GPUs")
    options = take(parser, arguments)
    if options.nproc is not None and options.nproc < 1:
        raise UserError(f"--nproc {options.nproc}: at least 1 process is needed")
    from launch.node import run_node

    return run_node(options.config, options.overrides, options.nproc)


def checkpoint(arguments: list[str]) -> int:
    """List, show, verify, diff, prune and convert checkpoints."""
    from launch.checkpoint import main as checkpoint_main

    return checkpoint_main(arguments)


def report(arguments: list[str]) -> int:
    """What a run's time went into, and what it bought."""
    from launch.report import main as report_main

    return report_main(arguments)


def watch(arguments: list[str]) -> int:
    """A run while it runs: every GPU, loss and speed, the last events."""
    from launch.watch import main as watch_main

    return watch_main(arguments)


VERBS = {"run": run, "checkpoint": checkpoint, "watch": watch, "report": report}


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    verbs = "\n".join(f"  {name:<12}{verb.__doc__}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description=f"What a person types around a run.\n\nverbs:\n{verbs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB")
    options = parser.parse_args(arguments[:1])
    try:
        return VERBS[options.verb](arguments[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return life.USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
