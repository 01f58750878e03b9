"""Events, console words, peaks, seeds, the run folder's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.host.console import duration, gib, si
from trainer.life.attempts import Attempt, End
from trainer.life.events import Events, append_row, read_events
from trainer.life.folder import RunFolder, write_json
from trainer.life.rows import read_json, read_rows
from trainer.ranks.seeds import derive, generator
from trainer.shown.peaks import peak_of_name


def test_a_row_after_a_torn_one_stands_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, {"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')  # a writer that was killed
    append_row(path, {"step": 3})
    assert [row["step"] for row in read_rows(path)] == [1, 3]


def test_events_of_all_writers_come_in_the_order_of_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    first, second = Events(folder, "a", "rank00000"), Events(folder, "b", "launcher")
    first.write("one")
    second.write("two", step=3)
    first.write("three")
    assert [row["event"] for row in read_events(folder)] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GeForce RTX 4090", None),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA A1000", None),
    ],
)
def test_a_gpu_that_is_not_listed_has_no_peak(name: str, tflops: float | None) -> None:
    assert peak_of_name(name) == (tflops * 1e12 if tflops is not None else None)


@given(st.lists(st.integers(0, 2**40) | st.text(max_size=5), min_size=1, max_size=4))
def test_seeds_are_pure_and_fit_a_generator(parts: list[int | str]) -> None:
    assert derive(*parts) == derive(*parts)
    assert 0 <= derive(*parts) < 2**63
    assert derive(*parts) != derive(*parts, 0)
    draws = [torch.rand(3, generator=generator(torch.device("cpu"), *parts)).tolist() for _ in range(2)]
    assert draws[0] == draws[1]


def test_words_for_people() -> None:
    assert [si(0), si(999), si(1234567), si(8.03e9)] == ["0", "999", "1.23 M", "8.03 G"]
    assert [gib(2048), gib(5 * 2**20), gib(3 * 2**30)] == ["2.0 KiB", "5.0 MiB", "3.00 GiB"]
    assert [duration(75), duration(3700)] == ["1:15", "1:01:40"]


def test_json_files_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "end.json"
    assert read_json(path) is None
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
    path.write_text('{"a": ')
    assert read_json(path) is None
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_end_stands(tmp_path: Path) -> None:
    attempt = Attempt.open(RunFolder(tmp_path))
    assert attempt.end is None
    attempt.write_end(End("stopped", 7, "step-00000007", True, "terminate"))
    attempt.write_end(End("failed", 0, None, True, "exit_code_1"))
    assert attempt.end == End("stopped", 7, "step-00000007", True, "terminate")
    assert attempt.end.exit_code == 75


def test_start_json_holds_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-1")
    monkeypatch.setenv("WANDB_API_KEY", "secret-2")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    attempt = Attempt.open(RunFolder(tmp_path))
    attempt.write_start(3, {"world_size": 2})
    text = (attempt.path / "start.json").read_text()
    assert "secret" not in text
    assert json.loads(text)["environment"]["NCCL_DEBUG"] == "WARN"
    assert attempt.start_step == 3
