"""A profile on request covers the requested steps and ranks, and no others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs.config import Config
from tests.distributed import tiny, train
from tests.engines import under_both
from trainer.life.events import read_events
from trainer.life.folder import RunFolder
from trainer.life.rows import read_rows


def profiled(config: dict[str, Any], ranks: int) -> tuple[RunFolder, list[str]]:
    assert train(config, ranks) == [0] * ranks
    folder = RunFolder(Path(config["run"]["dir"]))
    return folder, sorted(p.name for p in (folder.attempts / "000").glob("profile-*"))


@under_both
def test_a_range_of_steps_of_one_rank(engine: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(tmp_path, monitor__profile_steps=[1, 2], monitor__profile_ranks=[1], **engine)
    folder, files = profiled(config, 2)
    assert files == [f"profile-00000001-00000002-rank-00001.{kind}" for kind in ("json.gz", "txt")]
    trace = json.loads(gzip.decompress((folder.attempts / "000" / files[0]).read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum("gloo:all_reduce" in name for name in names) >= 2
    assert any("aten::mm" in name or "aten::addmm" in name or "linear" in name for name in names)
    assert "Self CPU" in (folder.attempts / "000" / files[1]).read_text()
    (event,) = [e for e in read_events(folder) if e["event"] == "profiled"]
    assert (event["first"], event["last"]) == (1, 2)


def test_a_file_asks_for_the_next_three_steps(tmp_path: Path) -> None:
    config = tiny(tmp_path, train__steps=8)
    folder = RunFolder(Path(config["run"]["dir"]))
    folder.root.mkdir()
    folder.profile.touch()
    _, files = profiled(config, 2)
    assert files == [f"profile-00000002-00000004-rank-00000.{kind}" for kind in ("json.gz", "txt")]
    assert not folder.profile.exists()
    assert len(read_rows(folder.metrics)) == 8


def test_a_run_that_ends_before_its_profile(tmp_path: Path) -> None:
    _, files = profiled(tiny(tmp_path, monitor__profile_steps=[5, 9]), 1)
    assert files[0].startswith("profile-00000005-00000006-rank-00000")


def test_a_range_that_runs_backwards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="the first step, 7, comes after the last, 5"):
        Config.model_validate(tiny(tmp_path, monitor__profile_steps=[7, 5]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_written_unasked(ranks: int, tmp_path: Path) -> None:
    assert profiled(tiny(tmp_path), ranks)[1] == []
