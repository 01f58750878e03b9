"""`python -m trainer [CONFIG] [--debug] [key=value ...]`, alone or under torchrun."""

from trainer.shadow import refuse_shadow

refuse_shadow()  # before any import that a folder of the user's could answer

import argparse  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402

from configs.errors import UserError  # noqa: E402
from configs.load import dump, load  # noqa: E402
from trainer import life  # noqa: E402
from trainer.parents import die_with_parent  # noqa: E402
from trainer.stop import StopWish  # noqa: E402

USER_ERROR_VARIABLE = "MUSTER_USER_ERROR"  # file through which a worker tells the launcher that a person erred


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Train a Transformer. CONFIG is a preset's name or a YAML file; without one, the demo runs.",
        epilog="exit codes of one process: 0 finished, 1 failed, 2 user error, 3 stopped, 75 stopped, start again",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a preset's name or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=100 optim.lr=1e-3")
    parser.add_argument("--debug", action="store_true", help="one process, a few steps cut to size, every check on")
    parser.add_argument("--print-config", action="store_true", help="print what would run, as YAML, and end")
    found = parser.parse_intermixed_args(arguments)
    if found.config is not None and "=" in found.config:
        found.overrides.insert(0, found.config)
        found.config = None
    return found


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    options = parse(arguments)
    wish = StopWish()
    try:
        config = load(options.config, options.overrides)
        if options.print_config:
            print(dump(config), end="")
            return life.FINISHED
        wish.listen()  # as early as can be: what comes before the first step is kept for it
        die_with_parent()
        if options.debug:
            from trainer.debug import debug

            return debug(config, wish)
        from trainer.start import start

        return start(config, wish)
    except UserError as error:
        return user_error(error, show_traceback=options.debug)


def user_error(error: UserError, show_traceback: bool) -> int:
    """Say it once, from rank 0, and tell a launcher: it must not start this again."""
    if int(os.environ.get("RANK", 0)) == 0:
        if show_traceback:
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
        if USER_ERROR_VARIABLE in os.environ:
            with open(os.environ[USER_ERROR_VARIABLE], "w", encoding="utf-8") as file:
                file.write(str(error))
    return life.FINISHED if USER_ERROR_VARIABLE in os.environ else life.USER_ERROR


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: threads of the process group or of a data loader must not hold up the end
