"""The words of a command line that begin a run: `[CONFIG] [key=value ...]` between options, in any order."""

from __future__ import annotations

import argparse

EXIT_CODES = "exit codes: 0 finished, 1 failed, 2 user error, 3 stopped, 75 stopped and wants to be started again"


def config_parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog=EXIT_CODES)
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a preset's name or a YAML file; default: the demo")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=100 optim.lr=1e-3")
    return parser


def take(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parsed words; `config` is None when the first word is an override already."""
    found = parser.parse_intermixed_args(arguments)
    if found.config is not None and "=" in found.config:
        found.overrides.insert(0, found.config)
        found.config = None
    return found
