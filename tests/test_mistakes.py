"""Mistakes that a person can make: one or two lines, exit code 2, no file changed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.distributed import run_ranks, tiny, train, write_config


def entry(arguments: list[str]) -> tuple[int, str]:
    """(exit code, what went to stderr) of `python -m trainer` in this process."""
    from trainer.__main__ import main

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main(arguments)
    return code, errors.getvalue()


def files_below(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} if folder.exists() else {}


def refused(folder: Path, arguments: list[str], *words: str, size: int = 1) -> None:
    """Check that the command ends with 2, prints `words` once, and leaves the run folder unchanged."""
    before = files_below(folder / "run")
    existed = (folder / "run").exists()
    results = run_ranks(size, entry, arguments, env={"TORCHELASTIC_RUN_ID": "x"} if size > 1 else None)
    assert [code for code, _ in results] == [2] * size
    text = results[0][1]
    assert all(not errors for _, errors in results[1:])
    assert 1 <= len(text.splitlines()) <= 3
    assert "Traceback" not in text
    for word in words:
        assert word in text
    assert files_below(folder / "run") == before
    assert (folder / "run").exists() == existed


def with_source(folder: Path, **source: Any) -> list[str]:
    config = tiny(folder)
    config["data"]["sources"][0] |= source
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return [str(folder / "config.yaml")]


def test_missing_config(tmp_path: Path) -> None:
    refused(tmp_path, [str(tmp_path / "nothing.yaml")], "nothing.yaml")


def test_unreadable_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: [1, 2\n")
    refused(tmp_path, [str(tmp_path / "config.yaml")], "config.yaml:")


def test_unknown_key_type_and_unit_at_once(tmp_path: Path) -> None:
    path = write_config(tmp_path, model__dims=3, train__steps="many", train__time_limit_s="2h")
    code, text = run_ranks(1, entry, [str(path)])[0]
    assert code == 2
    for word in ("model.dims", "model.dim", "train.steps", "train.time_limit_s", "seconds", "config.yaml:"):
        assert word in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "size"),
    [({"parallel__replicate": 2}, 3), ({"parallel__shard": 4}, 2), ({"parallel__replicate": 2}, 1)],
)
def test_layout_that_does_not_fit(changes: dict[str, int], size: int, tmp_path: Path) -> None:
    path = write_config(tmp_path, **changes)
    refused(tmp_path, [str(path)], "parallel.replicate", f"{size} rank", size=size)


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path, with_source(tmp_path, path=str(tmp_path / "empty")), "words", "empty", size=2)


def test_missing_corpus(tmp_path: Path) -> None:
    refused(tmp_path, with_source(tmp_path, path=str(tmp_path / "gone")), "words", "gone")


def test_debug_tells_a_mistake_in_as_few_lines(tmp_path: Path) -> None:
    refused(tmp_path, [*with_source(tmp_path, path=str(tmp_path / "gone")), "--debug"], "words", "gone")
    refused(tmp_path, ["--debug", "--train.steps", "3"], "train.steps=3")


def test_corpus_shorter_than_one_sample(tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    (tmp_path / "short/a.txt").write_text("too short")
    refused(tmp_path, with_source(tmp_path, path=str(tmp_path / "short")), "words", "shorter than one sample")


def test_bad_jsonl_line(tmp_path: Path) -> None:
    good = json.dumps({"text": "a text that is long enough"}) + "\n"
    (tmp_path / "data.jsonl").write_text(good * 2 + "{broken\n" + good)
    source = {"kind": "jsonl", "path": str(tmp_path / "data.jsonl")}
    refused(tmp_path, with_source(tmp_path, **source), "data.jsonl:3")


def test_token_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(5000, dtype=np.uint16))
    source = {"kind": "tokens", "path": str(tmp_path / "tokens.npy")}
    refused(tmp_path, with_source(tmp_path, **source), "tokens.npy", "260")


def test_run_folder_of_another_config(tmp_path: Path) -> None:
    path = str(write_config(tmp_path))
    assert train(tiny(tmp_path)) == [0]
    refused(tmp_path, [path, "optim.lr=1"], "optim.lr 0.001 -> 1", "run.accept_changes=[optim.lr]", size=2)
    accepted = [path, "optim.lr=1", "run.accept_changes=[optim.lr]", "train.steps=7"]
    assert run_ranks(1, entry, accepted)[0][0] == 0
    refused(tmp_path, [path, "run.accept_changes=[optim.rate]"], "optim.rate")


def test_a_folder_that_is_already_running(tmp_path: Path) -> None:
    path = str(write_config(tmp_path))
    from trainer.life.folder import RunFolder
    from trainer.life.lease import Lease

    lease = Lease.take(RunFolder(tmp_path / "run"), "here", 0, print)
    refused(tmp_path, [path], "already running", "STOP")
    lease.release()


def cut_short(checkpoint: Path) -> None:
    file = next(checkpoint.glob("model/*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(checkpoint: Path) -> None:
    file = next(checkpoint.glob("model/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(("damage", "word"), [(cut_short, "bytes"), (flip_a_bit, "checksum")])
@pytest.mark.parametrize("size", [1, 2])
def test_named_checkpoint_that_is_bad(damage: Callable[[Path], None], word: str, size: int, tmp_path: Path) -> None:
    assert train(tiny(tmp_path / "first")) == [0]
    checkpoint = tmp_path / "first/run/checkpoints/step-00000006"
    damage(checkpoint)
    path = write_config(tmp_path, start__from=str(checkpoint))
    refused(tmp_path, [str(path)], "start.from", "safetensors", word, size=size)
    assert checkpoint.exists()


def test_start_from_nothing(tmp_path: Path) -> None:
    path = write_config(tmp_path, start__from=str(tmp_path / "nowhere"))
    refused(tmp_path, [str(path)], "start.from", "nowhere", "does not exist", size=2)
    assert not (tmp_path / "cache").exists()  # refused before the corpus was read


def test_a_model_that_does_not_fit_the_checkpoint(tmp_path: Path) -> None:
    assert train(tiny(tmp_path / "first")) == [0]
    path = write_config(tmp_path, start__from=str(tmp_path / "first/run"), model__mlp_dim=96)
    refused(tmp_path, [str(path)], "reshaped", "blocks.0.mlp")
    assert not (tmp_path / "cache").exists()


def test_a_source_that_changed(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    assert train(config) == [0]
    path = str(write_config(tmp_path))
    (tmp_path / "corpus/003.txt").write_text("another text, of another length than before")
    switch = "run.accept_changes=[data.content]"
    refused(tmp_path, [path, "train.steps=8"], "'words' changed", "003.txt", switch)
    # To admit other sources does not admit other content: these are two switches.
    refused(tmp_path, [path, "train.steps=8", "run.accept_changes=[data.sources]"], "'words' changed", "003.txt")
    assert run_ranks(1, entry, [path, "train.steps=8", switch])[0][0] == 0
    assert "'words' changed" in events(tmp_path)["data_changed"]["what"]


def events(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The last event of each kind."""
    rows = [json.loads(line) for file in (tmp_path / "run/events").iterdir() for line in file.read_text().splitlines()]
    return {row["event"]: row for row in rows}


def test_a_source_that_was_moved(tmp_path: Path) -> None:
    """The same content at another place needs no switch. Other content there does."""
    from configs.config import Config
    from trainer.begin import fingerprints_to_find
    from trainer.life.folder import RunFolder

    config = tiny(tmp_path)
    assert train(config) == [0]
    built, folder = Config.model_validate(config), RunFolder(tmp_path / "run")
    assert fingerprints_to_find(built, folder).keys() == {"words"}  # an older cache is searched for these
    path = str(
        write_config(tmp_path, data__sources=[{**config["data"]["sources"][0], "path": str(tmp_path / "moved")}])
    )
    (tmp_path / "corpus").rename(tmp_path / "moved")
    (tmp_path / "moved/003.txt").rename(tmp_path / "003.txt")
    refused(tmp_path, [path, "train.steps=8"], "'words' changed", "003.txt")
    (tmp_path / "003.txt").rename(tmp_path / "moved/003.txt")
    assert run_ranks(1, entry, [path, "train.steps=8"])[0][0] == 0
    moved = events(tmp_path)["data_moved"]
    assert [moved[when][0]["path"] for when in ("old", "new")] == [str(tmp_path / "corpus"), str(tmp_path / "moved")]
    refused(tmp_path, [path, "train.steps=9", "data.sources.0.weight=2.0"], "data.sources", "weight")


def test_patterns_that_match_nothing(tmp_path: Path) -> None:
    refused(tmp_path, [str(write_config(tmp_path, freeze__frozen=["block.*"]))], "block.*", "matches no parameter")
    refused(tmp_path, [str(write_config(tmp_path, freeze__frozen=["*"]))], "nothing is left to train")
    assert not (tmp_path / "cache").exists()


def test_disk_too_small_for_what_will_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config(tmp_path)
    code, text = run_ranks(1, _entry_with_little_space, [str(path)])[0]
    assert code == 2
    assert "free" in text
    assert not (tmp_path / "run").exists()


def _entry_with_little_space(arguments: list[str]) -> tuple[int, str]:
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda path: usage._replace(free=1000)  # type: ignore[assignment]
    return entry(arguments)


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_folder_that_cannot_be_made(size: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path, [str(write_config(tmp_path)), f"run.dir={tmp_path}/file/run"], "run.dir", "file/run", size=size)


def _slow_preparation(config: dict[str, Any], seconds: float) -> int:
    from configs.config import Config
    from trainer.life.stop import StopWish
    from trainer.run import Run
    from trainer.start import start

    class Slow(Run):
        def _prepare(self) -> Path:
            time.sleep(seconds)
            return super()._prepare()

    return start(Config.model_validate(config), StopWish(), Slow)


def test_preparation_may_take_longer_than_a_collective(tmp_path: Path) -> None:
    config = tiny(tmp_path, parallel__load_timeout_s=3.0)
    assert run_ranks(2, _slow_preparation, config, 4.0) == [0, 0]


def _alone(config: dict[str, Any], arguments: list[str]) -> tuple[int, str]:
    """Rank 1 alone meets a mistake that a person must correct."""
    from configs.config import Config
    from configs.errors import UserError
    from trainer.tasks.lm import LanguageModelling

    if os.environ["RANK"] == "1":

        def refuse(self: LanguageModelling, path: Path, config: Config) -> Any:
            raise UserError(f"{path}: not readable on this node")

        LanguageModelling.open = refuse  # type: ignore[method-assign]
    return entry(arguments)


def test_what_one_rank_alone_meets_is_said_by_that_rank(tmp_path: Path) -> None:
    path = str(write_config(tmp_path))
    (first, _), (second, text) = run_ranks(2, _alone, {}, [path])
    assert (first, second) == (1, 2)  # the first rank only sees that its peer leaves
    assert "not readable on this node" in text
