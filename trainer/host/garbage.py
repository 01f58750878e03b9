"""Python's garbage collector, at the same steps on all ranks.

Left alone it stops each rank at a moment of its own, and all others wait for that rank in their next collective.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_STEPS = 100


@contextmanager
def collected_at_agreed_steps() -> Iterator[None]:
    """Nothing is collected meanwhile but by the two functions below."""
    gc.disable()
    collect_everything()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def collect_if_due(step: int) -> None:
    """After every `EVERY_STEPS`th step, collect what was made since training began: it takes milliseconds."""
    if step % EVERY_STEPS == 0:
        gc.collect()


def collect_everything() -> None:
    """Collect also what was there when training began: a whole engine that is built anew."""
    gc.unfreeze()
    gc.collect()
    if not gc.isenabled():
        gc.freeze()  # what is alive now stays: `collect_if_due` need not look at it
