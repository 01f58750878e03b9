"""All that is known to be wrong before a run starts is reported at once, with advice that works."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.config import Config
from configs.errors import UserError
from models import build_model
from tests.distributed import tiny
from tests.nobody import as_nobody
from trainer.checkpoint.load.start_from import checkpoint_named
from trainer.data.prepare import prepare
from trainer.engines.named import find_aliases, names_of
from trainer.life.folder import RunFolder
from trainer.preflight import Problem, check, check_numbers, check_place, refuse


def problems(folder: Path, processes: int = 1, **changes: Any) -> list[Problem]:
    config = Config.model_validate(tiny(folder, **changes))
    return check(config, processes, RunFolder(Path(config.run_dir)))


def text_of(found: list[Problem]) -> str:
    with pytest.raises(UserError) as raised:
        refuse(found)
    return str(raised.value)


def checkpoint(run: Path, step: int = 6) -> Path:
    """The parts of a checkpoint that the preflight reads."""
    path = run / f"checkpoints/step-{step:08d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    return path


def test_a_run_that_can_start_has_none_and_nothing_is_touched(tmp_path: Path) -> None:
    assert problems(tmp_path) == []
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()
    refuse([])


def test_all_are_said_at_once_cheap_ones_first(tmp_path: Path) -> None:
    source = {"name": "words", "path": str(tmp_path / "gone")}
    empty = {"name": "more", "path": str(tmp_path / "corpus"), "pattern": "*.md"}
    found = problems(
        *(tmp_path, 3),
        **{"parallel__replicate": 2, "freeze__frozen": ["block.*"], "start__from": str(tmp_path / "nowhere")},
        **{"data__tokenizer": str(tmp_path / "no.json"), "data__sources": [source, empty]},
    )
    words = ("parallel.replicate=2", "'block.*' matches no", "nowhere does not exist", "no.json", "gone", "'*.md'")
    assert [word in problem.text for word, problem in zip(words, found, strict=True)] == [True] * 6
    assert [problem.elsewhere for problem in found] == [False, False, True, True, True, True]
    assert text_of(found).startswith("6 mistakes:\nparallel.replicate=2")
    assert text_of([found[0], found[0]]) == found[0].text  # several runs with the same mistake


def test_what_every_rank_knows_by_itself_reads_nothing(tmp_path: Path) -> None:
    config = Config.model_validate(tiny(tmp_path, parallel__replicate=2, data__tokenizer="gone.json"))
    assert len(check_numbers(config, 3)) == 1
    assert check_numbers(config, 2) == []


def test_paths_that_only_nodes_see_are_not_looked_for(tmp_path: Path) -> None:
    config = Config.model_validate(tiny(tmp_path, start__from="/gone", data__tokenizer="/gone.json"))
    assert check(config, 1, RunFolder(tmp_path / "run"), paths=False) == []


@pytest.mark.parametrize(
    "change",
    [
        {"frozen": ["blocks.0.*"], "schedule": [{"step": 2, "frozen": ["blocks.7.*"]}]},
        {"frozen": ["*"]},
        {"trainable": ["head.bias"]},
    ],
)
def test_patterns_of_parameters_are_held_against_the_model(change: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(tmp_path) | {"freeze": change}
    found = check(Config.model_validate(config), 1, RunFolder(tmp_path / "run"))
    assert re.search("matches no parameter|nothing is left to train", text_of(found))


def test_the_names_are_those_of_the_model(tmp_path: Path) -> None:
    config = Config.model_validate(tiny(tmp_path, model__tie_embeddings=True, model__qkv_bias=True))
    model = build_model(config.model).module
    assert names_of(config.model) == ([name for name, _ in model.named_parameters()], find_aliases(model))


def test_where_a_run_continues_start_from_is_not_looked_for(tmp_path: Path) -> None:
    checkpoint(tmp_path / "run")
    assert problems(tmp_path, start__from=str(tmp_path / "gone")) == []


# ---- the run folder and the cache ------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path, told in (
        (tmp_path / "file", "it is not a folder"),
        (tmp_path / "file/a/b", f"{tmp_path}/file is not a folder"),
        (tmp_path / "link/a", f"{tmp_path}/link is a link to {tmp_path}/gone, which does not exist"),
        (tmp_path / ("ä" * 128), "has 256 bytes, 255 are the most"),
        (tmp_path / "a" / ("x" * 256), "has 256 bytes"),
        (tmp_path / "/".join(["x" * 200] * 20), "bytes, 3895 are the most"),
    ):
        with pytest.raises(UserError, match=re.escape(told)) as raised:
            check_place("run.dir", path)
        assert str(raised.value).startswith("run.dir: ")
    (tmp_path / "good").symlink_to(tmp_path)
    check_place("run.dir", tmp_path / "good" / ("x" * 255))
    assert sorted(os.listdir(tmp_path)) == ["file", "good", "link"]


def test_a_cache_that_cannot_be_made_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "data.cache: cannot write to" in text_of(problems(tmp_path, data__cache=str(tmp_path / "file/cache")))


def test_a_prepared_cache_that_is_closed_to_us_serves(open_path: Path) -> None:
    """Somebody else's cache. If something must be prepared in it, the run is refused before the queue."""
    words, cache = tiny(open_path), open_path / "cache"
    config = Config.model_validate(words)
    prepared = prepare(config, cache, lambda line: None, lambda: False)
    shutil.copytree(open_path / "corpus", open_path / "copy")
    copied = Config.model_validate(
        words | {"data": words["data"] | {"sources": [{"name": "words", "path": str(open_path / "copy")}]}}
    )
    renamed = Config.model_validate(
        words | {"data": words["data"] | {"sources": [{"name": "other", "path": str(open_path / "copy")}]}}
    )
    cache.chmod(0o755)
    with as_nobody():
        for same in (config, copied):
            assert check(same, 1, RunFolder(open_path / "run")) == []
            assert prepare(same, cache, lambda line: None, lambda: False) == prepared
        assert "data.cache: cannot write to" in text_of(check(renamed, 1, RunFolder(open_path / "run")))
        cache = open_path / "cache/none"
        empty = Config.model_validate(words | {"data": words["data"] | {"cache": str(cache)}})
        assert "data.cache: cannot write to" in text_of(check(empty, 1, RunFolder(open_path / "run")))


# ---- start.from ------------------------------------------------------------------------------------------------------


def named(path: Path) -> str:
    """What is reported about it."""
    with pytest.raises(UserError, match=r"start\.from: ") as raised:
        checkpoint_named(path)
    return str(raised.value)


def test_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path, 3), checkpoint(tmp_path, 6)
    assert checkpoint_named(tmp_path) == second
    assert checkpoint_named(first) == first


def test_what_lies_there_instead_is_said_and_what_to_name(tmp_path: Path) -> None:
    inside = checkpoint(tmp_path / "runs/a")
    (inside / "model").mkdir()
    weights = inside / "model/00000.safetensors"
    other = tmp_path / "hf/model.safetensors"
    other.parent.mkdir()
    for path in (weights, other, tmp_path / "runs/a/config.yaml"):
        path.write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    run = tmp_path / "runs/a"
    for path, told, name in (
        (tmp_path / "gone", "does not exist", None),
        (inside.with_name("step-00000007"), "does not exist; there are step-00000006", None),
        (tmp_path / "link", f"is a link to {tmp_path}/gone, which does not exist", None),
        (weights, "is only a part of a checkpoint", inside),
        (inside / "manifest.json", "is only a part of a checkpoint", inside),
        (run / "checkpoints", "is only a part of a run", run),
        (run / "config.yaml", "is only a part of a run", run),
        (tmp_path / "runs", f"holds no committed checkpoint; name one of its runs, such as {run}", run),
        (other, "is a file of safetensors without a checkpoint around it", None),
        (other.parent, "holds no committed checkpoint", None),
        (tmp_path / "pipe", "it is a pipe, not a file", None),
    ):
        text = named(path)
        assert told in text
        if name is not None:  # the advice works
            assert text.endswith(str(name))
            assert checkpoint_named(name) == inside


def test_what_can_be_converted_is_told_with_the_command(tmp_path: Path) -> None:
    from launch.checkpoint import main

    file = tmp_path / "a model.pt"
    torch.save({"weight": torch.zeros(3)}, file)
    text = named(file)
    assert f"{file} is a file of torch.save\n" in text
    words = shlex.split(text.partition("name that: python -m launch checkpoint ")[2])
    new = tmp_path / "new"
    assert main([*words[:-1], str(new)]) == 0
    assert checkpoint_named(new) == new
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp/.metadata").write_text("")
    assert "is a folder of torch.distributed.checkpoint\n" in named(tmp_path / "dcp")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero/mp_rank_00_model_states.pt").write_text("")
    assert "is a folder of DeepSpeed's\n" in named(tmp_path / "zero")
