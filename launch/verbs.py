"""What `python -m launch VERB ...`, `python -m slurm VERB ...` and `muster VERB ...` have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import NamedTuple

from configs.errors import UserError, tell
from trainer.host.arguments import Parser, typed
from trainer.life import attempts as life


class Verb(NamedTuple):
    """`main`: a function from arguments to an exit code, as `module:name`. It is imported when the verb is typed."""

    main: str
    help: str


def main_of(place: str) -> Callable[[list[str]], int]:
    """The function at `module:name`."""
    module, _, name = place.partition(":")
    found: Callable[[list[str]], int] = getattr(import_module(module), name)
    return found


def run_verb(room: str, description: str, verbs: Mapping[str, Verb], arguments: list[str]) -> int:
    """Run the verb that the arguments begin with; return the exit code. A person's mistake is printed here."""
    lines = "\n".join(f"  {name:<12}{verb.help}" for name, verb in verbs.items())
    parser = Parser(
        prog=typed(room),
        description=f"{description}\n\nverbs:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=verbs, metavar="VERB")
    try:
        options = parser.parse_args(arguments[:1])
        return main_of(verbs[options.verb].main)(arguments[1:])
    except UserError as error:
        tell(error)
        return life.USER_ERROR
