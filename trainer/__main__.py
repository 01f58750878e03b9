"""`python -m trainer [CONFIG] [--debug] [key=value ...]`, alone or under torchrun."""

from trainer.host.shadow import stand_apart

if __name__ == "__main__":  # before any import that a folder of the user's could answer
    stand_apart()

import argparse
import os

from configs.errors import UserError, printable, tell
from configs.load import dump, load
from trainer.host import environment
from trainer.host.arguments import config_parser, take
from trainer.host.environment import FromLauncher, Ranks
from trainer.host.parents import die_with_parent
from trainer.host.terminal import can_spell, enter, go_on_unheard, say_exactly
from trainer.life import attempts as life
from trainer.life.stop import StopWish


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = config_parser("trainer", "Train a Transformer, alone or as a worker of torchrun.")
    parser.add_argument("--debug", action="store_true", help="one process, a few steps cut to size, every check on")
    parser.add_argument("--print-config", action="store_true", help="print what would run, as YAML, and end")
    return take(parser, arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    ranks, launcher = Ranks(), None
    try:
        options = parse(arguments)
        environment.check(os.environ)
        ranks = Ranks.read(os.environ)
        launcher = launcher_of_this(ranks)
        wish = StopWish(launcher.stop_request if launcher else None)
        config = load(options.config, options.overrides)
        if options.print_config:
            text = dump(config)
            say_exactly(text if can_spell(text) else dump(config, ascii_only=True))
            return life.FINISHED
        go_on_unheard()
        wish.listen()  # as early as can be: what comes before the first step is kept for it
        if options.debug:
            from trainer.debug import debug

            return debug(config, wish)
        from trainer.start import start

        return start(config, wish)
    except UserError as error:
        return user_error(error, ranks, launcher)


def launcher_of_this(ranks: Ranks) -> FromLauncher | None:
    """Whom this process reports to. It ends with who started it; one started by hand may outlive its shell."""
    launcher = FromLauncher.read(os.environ)
    if launcher is not None and not die_with_parent(launcher.parent):
        launcher.refuse_as_left_over()
    if launcher is None and ranks.by_torchrun:
        die_with_parent(os.getppid())  # bare torchrun names no pid; when it dies it takes the ranks' store along
    return launcher


def user_error(error: UserError, ranks: Ranks, launcher: FromLauncher | None) -> int:
    """Say it once, and tell each node's launcher: it must not start this again.

    Of what ranks agreed on, rank 0 speaks. Else only torchrun makes it sure that there is a first rank of the node; a
    package, say, may be missing on this node alone.
    """
    first_here = ranks.local_rank == 0 or not ranks.by_torchrun
    if ranks.rank == 0 or (not error.agreed and (first_here or error.alone)):
        tell(error)
    if launcher is not None and (first_here or error.alone):
        with launcher.user_error.open("a", encoding="utf-8") as file:
            file.write(printable(f"{error}\n"))
    # To torchrun's agent 0 means: nothing to start again. The launcher ends the ranks that still wait.
    return life.FINISHED if launcher is not None else life.USER_ERROR


if __name__ == "__main__":
    enter(main)
