"""Python's garbage collector, out of the way where millions of objects are made that all stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Nothing is collected meanwhile; for what takes seconds. The manifest of a thousand ranks is millions of small
    objects without cycles, and the collector would look at all of them again and again: more than half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
