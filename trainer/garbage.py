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
    """Nothing is collected meanwhile but by `collect_if_due`. What is alive now is not looked at again."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def collect_if_due(step: int) -> None:
    """Collect after every `EVERY_STEPS`th step."""
    if step % EVERY_STEPS == 0:
        gc.collect()
