"""`make gpu` gives numbers: its smallest row runs here completely, on a CPU."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from benchmarks import packages
from benchmarks.gpu_speed import ABOUT_S, ROWS, SHAPES, main, make_config, measure
from trainer.life.folder import RunFolder
from trainer.life.rows import read_rows

TINY = ["--rows", "tiny@64", "--steps", "5"]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as `main` sets it, and undone after the test


def test_a_row_is_measured_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--json", str(tmp_path / "new/speed.json")]) == 0
    (row,) = json.loads((tmp_path / "new/speed.json").read_text())["rows"]
    assert (row["shape"], row["sequence"], row["tokens/step"], row["steps"], row["note"]) == ("tiny", 64, 256, 2, "")
    assert row["tokens/s"] > 0
    assert row["memory (GiB)"] > 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny |")]
    assert len(printed) == 2  # when it is measured, and in the table
    assert f"{row['tokens/s']:.4g}" in printed[0]


def test_a_run_that_is_killed_keeps_the_steps_it_made(tmp_path: Path) -> None:
    config = make_config("tiny", 64, 100_000, tmp_path, [])
    folder = RunFolder(Path(config.run_dir))

    def kill_after_five_steps() -> None:
        while len(read_rows(folder.metrics)) < 5:
            time.sleep(0.05)
        os.kill(json.loads(folder.lease.read_text())["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill_after_five_steps, daemon=True)
    killer.start()
    row = measure("tiny", config, limit_s=100.0)
    killer.join()
    assert row["note"] == "failed: rank 0: died"
    assert row["steps"] >= 2
    assert row["tokens/s"] > 0


def test_a_row_that_fails_names_its_cause_and_takes_no_other(tmp_path: Path) -> None:
    config = make_config("tiny", 64, 5, tmp_path, ["data.tokenizer=/nothing/here"])
    row = measure("tiny", config, limit_s=100.0)
    assert "/nothing/here" in row["note"]
    assert row["tokens/s"] == "not measured"


def test_the_limit_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did not answer" in measure("tiny", make_config("tiny", 64, 5, tmp_path, []), limit_s=0.0)["note"]
    with pytest.raises(SystemExit, match="--limit-s 1 is too short"):
        main([*TINY, "--limit-s", "1"])
    assert "[1/1] tiny@64: left out" in capsys.readouterr().out


def test_large_shapes_are_refused_without_a_gpu() -> None:
    with pytest.raises(SystemExit, match="need an NVIDIA GPU"):
        main(["--rows", "8b@8192"])


def test_the_rows_are_of_known_shapes_and_the_first_ones_fit_the_limit() -> None:
    shapes = [row.partition("@")[0] for row in ROWS.split(",")]
    assert set(shapes) == {"1b", "3b", "8b"} <= SHAPES.keys()
    assert sum(ABOUT_S[shape] for shape in shapes[:4]) < 420


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.missing() == ([], [])

    def some(name: str) -> str:
        if name in ("pydantic", "wandb"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(packages, "version", some)
    assert packages.missing() == (["pydantic"], ["wandb"])
