"""`muster VERB ...`: the verbs of `python -m trainer`, `launch` and `slurm`, and a few of its own. Imports no torch."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import launch.__main__
import slurm.__main__
from launch.verbs import Verb, run_verb
from trainer.host.arguments import Parser, be_muster, typed
from trainer.host.shadow import OURS
from trainer.host.terminal import say

_DESCRIPTION = "Train Transformers on clusters: stop anywhere, resume exactly. `muster --version` says which this is."
_OF_A_JOB = ("job", "after")  # what batch scripts run, not people

VERBS = {
    "train": Verb("trainer.__main__:main", "Train in this process: alone, or as a worker of torchrun."),
    **launch.__main__.VERBS,
    **{name: verb for name, verb in slurm.__main__.VERBS.items() if name not in _OF_A_JOB},
    "presets": Verb("muster.command:presets_main", "The configs that come with Muster, and what each is."),
    "completion": Verb("muster.completion:main", "The script by which bash, zsh or fish completes what you type."),
}


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    be_muster()
    if arguments[:1] == ["complete"]:
        from muster.completion import answer

        return answer(arguments[1:])
    if arguments[:1] == ["--version"]:
        say(about_this())
        return 0
    return run_verb("muster", _DESCRIPTION, VERBS, arguments)


def about_this() -> str:
    """Which Muster this is, for a report."""
    told = [f"{name} {_version(name)}" for name in ("muster", "torch")]
    return ", ".join([*told, f"Python {platform.python_version()}, in {OURS}"])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def presets_main(arguments: list[str]) -> int:
    """Returns the exit code."""
    from configs.presets import about, presets
    from launch.look.text import table

    Parser(prog=typed("muster presets"), description=VERBS["presets"].help).parse_args(arguments)
    say("\n".join(table(("preset", "what it is"), [(name, about(name)) for name in presets()])))
    return 0
