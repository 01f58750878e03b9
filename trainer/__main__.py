"""`python -m trainer [CONFIG] [--debug] [key=value ...]`, alone or under torchrun."""

from trainer.shadow import refuse_shadow

refuse_shadow()  # before any import that a folder of the user's could answer

import argparse  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402

from configs.errors import UserError  # noqa: E402
from configs.load import dump, load  # noqa: E402
from trainer import environment, life  # noqa: E402
from trainer.arguments import config_parser, take  # noqa: E402
from trainer.environment import FromLauncher, Ranks  # noqa: E402
from trainer.parents import die_with_parent  # noqa: E402
from trainer.stop import StopWish  # noqa: E402


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = config_parser("python -m trainer", "Train a Transformer, alone or as a worker of torchrun.")
    parser.add_argument("--debug", action="store_true", help="one process, a few steps cut to size, every check on")
    parser.add_argument("--print-config", action="store_true", help="print what would run, as YAML, and end")
    return take(parser, arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse(arguments)
    ranks, launcher = Ranks(), None
    try:
        environment.check(os.environ)
        ranks = Ranks.read(os.environ)
        launcher = launcher_of_this(ranks)
        wish = StopWish(launcher.stop_request if launcher else None)
        config = load(options.config, options.overrides)
        if options.print_config:
            print(dump(config), end="")
            return life.FINISHED
        wish.listen()  # as early as can be: what comes before the first step is kept for it
        if options.debug:
            from trainer.debug import debug

            return debug(config, wish)
        from trainer.start import start

        return start(config, wish)
    except UserError as error:
        return user_error(error, ranks, launcher, show_traceback=options.debug)


def launcher_of_this(ranks: Ranks) -> FromLauncher | None:
    """Whom this process reports to. It ends with who started it; one started by hand may outlive its shell."""
    launcher = FromLauncher.read(os.environ)
    if launcher is not None and not die_with_parent(launcher.parent):
        launcher.refuse_as_left_over()
    if launcher is None and ranks.by_torchrun:
        die_with_parent(os.getppid())  # bare torchrun names no pid; when it dies it takes the ranks' store along
    return launcher


def user_error(error: UserError, ranks: Ranks, launcher: FromLauncher | None, show_traceback: bool) -> int:
    """Say it once, and tell a launcher: it must not start this again.

    Only torchrun, or an agreement, makes it sure that there is a rank 0 that says it for all.
    """
    if ranks.rank == 0 or error.alone or not (ranks.by_torchrun or error.agreed):
        if show_traceback:
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
        if launcher is not None:
            with launcher.user_error.open("a", encoding="utf-8") as file:
                file.write(f"{error}\n")
    # To torchrun's agent 0 means: nothing to start again. The launcher ends the ranks that still wait.
    return life.FINISHED if launcher is not None else life.USER_ERROR


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: threads of the process group or of a data loader must not hold up the end
