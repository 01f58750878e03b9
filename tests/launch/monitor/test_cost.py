"""The cost of the monitor."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.monitor import measure
from tests.machine import slowness


@pytest.mark.full
@pytest.mark.alone
def test_a_row_a_second_costs_half_a_percent_of_a_core_at_most(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    monkeypatch.setenv("STANDIN_NVML", str(tmp_path / "gpus.txt"))
    (tmp_path / "gpus.txt").write_text("gpus 8\n")
    before = slowness()
    found = measure(tmp_path, 1.0, 20.0)
    assert found["rows"] >= 19
    assert found["row_bytes"] > 4000  # all eight are in it
    assert found["share_pct"] < 0.5 * max(1.0, min(before, slowness()))
