"""Python's garbage collector, at the same steps on all ranks.

Left alone it stops each rank at a moment of its own, and all others wait for that rank in their next collective.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_STEPS = 100
_FROZEN_AT_FIRST = gc.get_freeze_count()  # by Python 3.12 itself, some hundred objects


@contextmanager
def collected_at_agreed_steps() -> Iterator[None]:
    """Nothing is collected meanwhile but by the two functions below. What is alive now is not looked at again."""
    frozen_before = gc.get_freeze_count() > _FROZEN_AT_FIRST
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen_before:  # else it is somebody else's to say when that is looked at again
            gc.unfreeze()
        gc.enable()


def collect_if_due(step: int) -> None:
    """After every `EVERY_STEPS`th step, collect what was made since training began: it takes milliseconds."""
    if step % EVERY_STEPS == 0:
        gc.collect()


def collect_everything() -> None:
    """Collect at once. During training this includes what was alive when it began: an engine that is built anew."""
    training = not gc.isenabled()
    if training:
        gc.unfreeze()
    gc.collect()
    if training:
        gc.freeze()
