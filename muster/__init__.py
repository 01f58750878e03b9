"""The `muster` command: every verb that a person types, in any folder."""

import os
import sys
from typing import NoReturn


def script() -> NoReturn:
    """What pip installs as `muster`."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from trainer.host.shadow import stand_apart

    del sys.path[0]
    stand_apart()  # before all other imports: PYTHONPATH may hold a folder that has its own `configs`

    from muster.command import main
    from trainer.host.terminal import enter

    enter(main)
