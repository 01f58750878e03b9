"""Switch Python's garbage collector off where millions of objects are made that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect no garbage in this block, for work of seconds. The manifest of a thousand ranks is millions of small
    objects without cycles. The collector would look at all of them repeatedly, for more than half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
