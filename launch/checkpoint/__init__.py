"""`python -m launch checkpoint VERB ...`: look at checkpoints, check, compare, prune and convert them.

The arguments are parsed, and the files they name are looked for, before torch is imported.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from configs.errors import UserError
from trainer.host.arguments import Parser, typed

EXIT_CODES = "exit codes: 0 good or equal or done, 1 bad or different, 2 user error"


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    options = parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog=typed("launch checkpoint"), description="Look at checkpoints, and change them.", epilog=EXIT_CODES
    )
    verbs = top.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
        added.set_defaults(run=run)
        return added

    listing = verb("list", _list, "a table of the checkpoints of a run, or of every run in a folder")
    listing.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="RUN", help="default: runs")
    _json(listing)

    show = verb("show", _show, "what is in a checkpoint")
    show.add_argument("checkpoint", type=Path, metavar="CKPT", help="a checkpoint, or a run folder: its newest")
    show.add_argument("patterns", nargs="*", metavar="PATTERN", help="only these parameters, e.g. 'blocks.0.*'")
    _json(show)

    verify = verb("verify", _verify, "read every block of every file and compare its checksum")
    verify.add_argument("folder", type=Path, metavar="CKPT|RUN", help="a checkpoint, or a run folder: all of its")
    verify.add_argument("--threads", type=_positive, metavar="N", help="default: one per core, at most 8")

    diff = verb("diff", _diff, "what changed from one checkpoint to another, and by how much")
    diff.add_argument("first", type=Path, metavar="A", help="a checkpoint of any kind, or a run folder: its newest")
    diff.add_argument("second", type=Path, metavar="B", help="likewise")
    diff.add_argument("--all", action="store_true", help="a row for every tensor that changed, not the 20 largest")
    _json(diff)

    prune = verb("prune", _prune, "delete checkpoints that need not be kept")
    prune.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    prune.add_argument("--last", type=_positive, metavar="N", help="keep the newest N; default: the run's own setting")
    prune.add_argument("--every-steps", type=_positive, metavar="N", help="keep also every step that N divides")
    prune.add_argument("--bad", action="store_true", help="delete also those that were set aside as .bad-<k>")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    prune.add_argument("--yes", action="store_true", help="do not ask")

    convert = verb("convert", _convert, "write a checkpoint as one of another kind")
    convert.add_argument(
        "source", type=Path, metavar="SRC", help="a checkpoint of any kind, or a run folder: its newest"
    )
    convert.add_argument("target", type=Path, metavar="DST", help="a new name")
    kinds = ("muster", "torch", "dcp")
    convert.add_argument(
        "--from",
        dest="kind",
        choices=(*kinds, "deepspeed"),
        metavar="KIND",
        help="of SRC: muster, torch, dcp or deepspeed; default: found by looking",
    )
    convert.add_argument("--to", default="muster", choices=kinds, metavar="KIND", help="muster (default), torch or dcp")
    convert.add_argument("--take", choices=("everything", "weights"), default="everything", help="default: everything")
    return top


def _json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="for programs")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1 is needed")
    return number


def _existing(*paths: Path) -> None:
    for path in paths:
        try:
            path.stat()
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _list(options: argparse.Namespace) -> int:
    _existing(options.folder)
    from launch.checkpoint.list import list_checkpoints

    return list_checkpoints(options.folder, options.json)


def _show(options: argparse.Namespace) -> int:
    _existing(options.checkpoint)
    from launch.checkpoint.show import show

    return show(options.checkpoint, options.patterns, options.json)


def _verify(options: argparse.Namespace) -> int:
    _existing(options.folder)
    from launch.checkpoint.verify import verify

    return verify(options.folder, options.threads)


def _diff(options: argparse.Namespace) -> int:
    _existing(options.first, options.second)
    from launch.checkpoint.diff import diff

    return diff(options.first, options.second, options.all, options.json)


def _prune(options: argparse.Namespace) -> int:
    _existing(options.folder)
    from launch.checkpoint.prune import prune

    return prune(options.folder, options.last, options.every_steps, options.bad, options.dry_run, options.yes)


def _convert(options: argparse.Namespace) -> int:
    _existing(options.source)
    from launch.checkpoint.convert.command import convert_checkpoint

    return convert_checkpoint(options.source, options.target, options.to, options.kind, options.take == "weights")
