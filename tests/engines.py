"""Parameters for tests that run under both engines. What takes long is left to `--full`, which a `make` target runs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def rows(once: list[tuple[str, ...]], *columns: Iterable[Any]) -> list[Any]:
    """Parameters for a test: every combination, of which those not named in `once` are only for `--full`."""
    found = []
    for row in product(*columns):
        names = tuple(str(getattr(value, "name", value)) for value in row)
        marks = [] if names in once else [pytest.mark.full]
        found.append(pytest.param(*row, id="-".join(names).replace(" ", "-"), marks=marks))
    return found


ENGINES = ["fsdp", "zero"]
# For a test with the fixture `engine` whose run under ZeRO is left to `--full`.
under_both = pytest.mark.parametrize("engine", rows([("fsdp",)], ENGINES), indirect=True)
