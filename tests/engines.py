"""Parameters for tests that run under both engines. Slow combinations run only with `--full`, by a `make` target."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def rows(once: list[tuple[str, ...]], *columns: Iterable[Any]) -> list[Any]:
    """Parameters for a test: every combination. Those that `once` does not name run only with `--full`."""
    found = []
    for row in product(*columns):
        names = tuple(str(getattr(value, "name", value)) for value in row)
        marks = [] if names in once else [pytest.mark.full]
        found.append(pytest.param(*row, id="-".join(names).replace(" ", "-"), marks=marks))
    return found


ENGINES = ["fsdp", "zero"]
# For a test with the fixture `engine` whose run under ZeRO needs `--full`.
under_both = pytest.mark.parametrize("engine", rows([("fsdp",)], ENGINES), indirect=True)
