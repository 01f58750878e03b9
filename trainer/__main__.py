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
from trainer.arguments import config_parser, take  # noqa: E402
from trainer.parents import die_with_parent  # noqa: E402
from trainer.stop import StopWish  # noqa: E402

USER_ERROR_VARIABLE = "MUSTER_USER_ERROR"  # file through which a worker tells the launcher that a person erred


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = config_parser("python -m trainer", "Train a Transformer, alone or as a worker of torchrun.")
    parser.add_argument("--debug", action="store_true", help="one process, a few steps cut to size, every check on")
    parser.add_argument("--print-config", action="store_true", help="print what would run, as YAML, and end")
    return take(parser, arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    die_with_parent()
    options = parse(arguments)
    wish = StopWish()
    try:
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
        return user_error(error, show_traceback=options.debug)


def user_error(error: UserError, show_traceback: bool) -> int:
    """Say it once, and tell a launcher: it must not start this again."""
    if int(os.environ.get("RANK", 0)) == 0 or error.alone:
        if show_traceback:
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
        if USER_ERROR_VARIABLE in os.environ:
            with open(os.environ[USER_ERROR_VARIABLE], "a", encoding="utf-8") as file:
                file.write(f"{error}\n")
    # To torchrun's agent 0 means: nothing to start again. The launcher ends the ranks that still wait.
    return life.FINISHED if USER_ERROR_VARIABLE in os.environ else life.USER_ERROR


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: threads of the process group or of a data loader must not hold up the end
