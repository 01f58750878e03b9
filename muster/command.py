"""`muster VERB ...`: the verbs of `python -m trainer`, `launch` and `slurm`, and a few of its own. Imports no torch."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from launch.verbs import run_verb
from muster.completion import answer
from muster.verbs import VERBS
from trainer.host.arguments import Parser, be_muster, typed
from trainer.host.shadow import OURS
from trainer.host.terminal import say

_DESCRIPTION = "Train Transformers on clusters: stop anywhere, resume exactly. `muster --version` says which this is."


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    be_muster()
    if arguments[:1] == ["complete"]:
        return answer(arguments[1:])
    if arguments[:1] == ["--version"]:
        say(about_this())
        return 0
    return run_verb("muster", _DESCRIPTION, VERBS, arguments)


def about_this() -> str:
    """Version and place of this Muster, for a report."""
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
