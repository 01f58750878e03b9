"""Limits that mean the same on a slower machine and beside other work, and still find what is slow."""

from __future__ import annotations

import os

import pytest

from tests import machine
from tests.machine import patience, takes_at_most


def works(count: int) -> None:
    for _ in range(count):
        machine._work()


def test_a_slower_machine_has_longer_and_slow_code_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_s = 2 * machine.REFERENCE_S
    takes_at_most(limit_s, lambda: works(1))
    with pytest.raises(AssertionError, match="processor time"):
        takes_at_most(limit_s, lambda: works(20))
    monkeypatch.setattr(machine, "REFERENCE_S", machine.REFERENCE_S / 20)  # as if this one were 20 times slower
    takes_at_most(limit_s, lambda: works(20))


def test_patience_is_longer_where_more_wants_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUSTER_TEST_PATIENCE", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 9.0, 9.0))
    assert patience(10.0) == 10.0
    monkeypatch.setattr(os, "getloadavg", lambda: (6.0, 0.0, 0.0))
    assert patience(10.0) == 30.0
    monkeypatch.setenv("MUSTER_TEST_PATIENCE", "2")
    assert patience(10.0) == 60.0
