"""The words of a command line: `[CONFIG] [key=value ...]` between options, and the mistakes in them. No torch."""

from __future__ import annotations

import argparse
import re
import shlex
from typing import NoReturn

from configs.errors import UserError

EXIT_CODES = "exit codes: 0 finished, 1 failed, 2 user error, 3 stopped, 75 stopped and wants to be started again"

_as_muster = False


class Parser(argparse.ArgumentParser):
    """Raises a person's mistake as UserError, as everywhere: one or two lines, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; to see what can be written: {self.prog} --help")


def be_muster() -> None:
    """`muster` was typed: from now on help and advice show commands of that form."""
    global _as_muster
    _as_muster = True


def typed(words: str, *names: object) -> str:
    """How a person types `slurm stop` and `names`: after `python -m`, or after `muster` if they typed that."""
    room, _, verb = words.partition(" ")
    verb = "train" if room == "trainer" else verb
    start = ["muster", verb] if _as_muster or room == "muster" else ["python -m", words]
    return " ".join([*filter(None, start), *(shlex.quote(str(name)) for name in names)])


def config_parser(words: str, description: str | None) -> Parser:
    parser = Parser(prog=typed(words), description=description, epilog=EXIT_CODES)
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a preset's name or a YAML file; default: the demo")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=100 optim.lr=1e-3")
    return parser


def take(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The parsed words. `config` is None when the first word is an override. Raises UserError."""
    _refuse_dashes(arguments)
    found = parser.parse_intermixed_args(arguments)
    if found.config is not None and "=" in found.config:
        found.overrides.insert(0, found.config)
        found.config = None
    return found


def _refuse_dashes(arguments: list[str]) -> None:
    """Raise UserError for `--train.steps 10` and `--config x.yaml`, as other programs take them."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = word.removeprefix("--").partition("=")
        value = value if equals else following
        if word.startswith("--") and "." in name:
            raise UserError(f"{word}: settings are written without dashes: {name}={value or 'VALUE'}")
        if not equals and "." in word and _is_key(word.removeprefix("-")):
            raise UserError(f"{word}: a setting is one word: {name.removeprefix('-')}={value or 'VALUE'}")
        if word.startswith("--") and name == "config":
            raise UserError(f"{word}: the config is written alone: {value or 'CONFIG'}")


def _is_key(word: str) -> bool:
    from configs.explain import all_keys  # late, as the schema imports slowly: shell completion does without

    return re.sub(r"\.\d+\.", ".*.", word) in all_keys()
