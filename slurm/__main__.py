"""`python -m slurm VERB ...`."""

from trainer.shadow import refuse_shadow

refuse_shadow()  # before any import that a folder of the user's could answer

import argparse  # noqa: E402
import sys  # noqa: E402

from configs.errors import UserError  # noqa: E402
from trainer import life  # noqa: E402


def cluster(arguments: list[str]) -> int:
    """Start, stop or show a real Slurm cluster on this machine, to rehearse on."""
    from slurm.cluster import main as cluster_main

    return cluster_main(arguments)


def job(arguments: list[str]) -> int:
    """What runs on each node of a job: srun --ntasks-per-node=1 python -m slurm job CONFIG."""
    from slurm.job import main as job_main

    return job_main(arguments)


def submit(arguments: list[str]) -> int:
    """Submit a run; --dry-run prints the batch script."""
    from slurm.submit import main as submit_main

    return submit_main(arguments)


def status(arguments: list[str]) -> int:
    """How runs are: a table of all, or all lives of one."""
    from slurm.status import main as status_main

    return status_main(arguments)


def watch(arguments: list[str]) -> int:
    """The same table, live."""
    from slurm.watch import main as watch_main

    return watch_main(arguments)


def logs(arguments: list[str]) -> int:
    """What a run printed; -f follows it."""
    from slurm.logs import main as logs_main

    return logs_main(arguments)


def stop(arguments: list[str]) -> int:
    """Let a run save and end."""
    from slurm.stop import stop_main

    return stop_main(arguments)


def cancel(arguments: list[str]) -> int:
    """Take a job out of the queue, or end it now."""
    from slurm.stop import cancel_main

    return cancel_main(arguments)


VERBS = {f.__name__: f for f in (submit, status, watch, logs, stop, cancel, cluster, job)}


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    verbs = "\n".join(f"  {name:<12}{verb.__doc__}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="python -m slurm",
        description=f"Muster on a Slurm cluster.\n\nverbs:\n{verbs}",
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
