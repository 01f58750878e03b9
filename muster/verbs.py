"""Every verb of `muster`: those of `python -m trainer`, `launch` and `slurm`, and a few of its own. No torch."""

from __future__ import annotations

import launch.__main__
import slurm.__main__
from launch.verbs import Verb

_OF_A_JOB = ("job", "after")  # only batch scripts run these

VERBS = {
    "train": Verb("trainer.__main__:main", "Train in this process: alone, or as a worker of torchrun."),
    **launch.__main__.VERBS,
    **{name: verb for name, verb in slurm.__main__.VERBS.items() if name not in _OF_A_JOB},
    "presets": Verb("muster.command:presets_main", "The configs that come with Muster, and what each is."),
    "completion": Verb("muster.completion:main", "The script by which bash, zsh or fish completes what you type."),
}
