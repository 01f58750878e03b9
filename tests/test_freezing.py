"""Frozen parameters: originals and optimizer state survive freezing, unfreezing, restarts and other layouts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import RanksFailed, run_ranks, tiny, train
from tests.stored import Stored
from tests.test_train import losses
from trainer.life.events import read_events
from trainer.life.folder import RunFolder
from trainer.life.rows import read_json

BOTTOM = ["embed.*", "blocks.0.*"]


def stored(run: Path, step: int) -> Stored:
    return Stored(run / f"checkpoints/step-{step:08d}")


def is_bottom(name: str) -> bool:
    return name.startswith(("embed.", "blocks.0."))


def config_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return tiny(folder, optim__schedule="constant", optim__warmup_steps=0, checkpoint__keep={"last": 100}, **changes)


@pytest.mark.parametrize(
    ("compute", "sizes"),
    [
        ("fp32", (1, 2, 1)),
        pytest.param("bf16", (2, 1, 3), marks=pytest.mark.full),
        pytest.param("fp32", (2, 1, 3), marks=pytest.mark.full),
        pytest.param("bf16", (1, 2, 1), marks=pytest.mark.full),
    ],
)
def test_frozen_after_training_and_unfrozen_again(compute: str, sizes: tuple[int, int, int], tmp_path: Path) -> None:
    """Three runs, each from everything of the one before, at other world sizes: all parameters train, then the bottom
    is frozen, then all train again. No bit of the bottom is lost, and its optimizer continues its count."""
    first = config_of(tmp_path / "a", train__steps=3, precision__compute=compute)
    assert train(first, sizes[0]) == [0] * sizes[0]
    began = stored(tmp_path / "a/run", 3)

    second = config_of(tmp_path / "b", train__steps=6, precision__compute=compute, checkpoint__every_steps=1)
    second["data"] = first["data"]
    second["start"] = {"from": str(tmp_path / "a/run"), "take": "everything"}
    second["freeze"] = {"frozen": BOTTOM}
    assert train(second, sizes[1]) == [0] * sizes[1]
    for step in (4, 5, 6):
        frozen = stored(tmp_path / "b/run", step)
        assert frozen.tensors.keys() == began.tensors.keys()
        for key in began.tensors:
            assert frozen.same(began, key) == is_bottom(key), key
        assert frozen.manifest["step_counts"] == {n: 3 if is_bottom(n) else step for n in began.manifest["step_counts"]}
        for name, entry in frozen.manifest["tensors"].items():
            if entry["group"] != "optim":
                assert entry["group"] == ("frozen" if is_bottom(name) else "model")
                assert entry["trained_step"] == (3 if is_bottom(name) else step)

    third = config_of(tmp_path / "c", train__steps=8, precision__compute=compute, checkpoint__every_steps=1)
    third["data"] = first["data"]
    third["start"] = {"from": str(tmp_path / "b/run"), "take": "everything"}
    assert train(third, sizes[2]) == [0] * sizes[2]
    ended = stored(tmp_path / "c/run", 7)
    assert ended.tensors.keys() == began.tensors.keys()
    assert ended.manifest["step_counts"] == {n: 4 if is_bottom(n) else 7 for n in began.manifest["step_counts"]}
    assert not any(ended.same(began, key) for key in began.tensors)


def test_a_schedule_is_what_restarts_by_hand_would_do(tmp_path: Path) -> None:
    """Freeze at 2 and unfreeze at 4, in one run and in three: every step has the same bits."""
    schedule = [{"step": 2, "frozen": BOTTOM}, {"step": 4, "frozen": ["head.*"]}]
    one = config_of(tmp_path / "one", train__steps=6, checkpoint__every_steps=1, freeze__schedule=schedule)
    assert train(one, 2) == [0, 0]
    parts = []
    for name, steps, frozen in (("a", 2, []), ("b", 4, BOTTOM), ("c", 6, ["head.*"])):
        part = config_of(tmp_path / name, train__steps=steps, checkpoint__every_steps=1, freeze__frozen=frozen)
        part["data"] = one["data"]
        if parts:
            part["start"] = {"from": parts[-1]["run"]["dir"], "take": "everything"}
        assert train(part, 2) == [0, 0]
        parts.append(part)
    assert losses(one) == [loss for part in parts for loss in losses(part)]
    for name, steps in (("a", (1, 2)), ("b", (3, 4)), ("c", (5, 6))):
        for step in steps:
            whole, part_of = stored(tmp_path / "one/run", step), stored(tmp_path / name / "run", step)
            assert whole.tensors.keys() == part_of.tensors.keys()
            assert all(whole.same(part_of, key) for key in whole.tensors)
            assert whole.manifest["step_counts"] == part_of.manifest["step_counts"]
    changes = [e for e in read_events(RunFolder(tmp_path / "one/run")) if e["event"] == "freeze_changed"]
    assert sorted({e["step"] for e in changes}) == [2, 4]
    # A restart in the middle, at another world size, finds its place in the schedule.
    again = config_of(tmp_path / "again", train__steps=3, checkpoint__every_steps=3, freeze__schedule=schedule)
    again["data"] = one["data"]
    assert train(again, 2) == [0, 0]
    again["train"]["steps"] = 6
    assert train(again, 1) == [0]
    assert losses(again) == pytest.approx(losses(one), abs=2e-5)
    assert stored(tmp_path / "again/run", 6).manifest["step_counts"] == whole.manifest["step_counts"]


def test_originals_keep_their_number_format(tmp_path: Path) -> None:
    """fp32 originals under bf16 parameters: while frozen they stay fp32 in every checkpoint, bit for bit."""
    first = config_of(tmp_path / "a", train__steps=3)
    assert train(first, 2) == [0, 0]
    began = stored(tmp_path / "a/run", 3)
    narrow = {"params": "bf16", "compute": "bf16"}
    second = config_of(tmp_path / "b", train__steps=4, checkpoint__every_steps=1, precision=narrow)
    second["data"], second["freeze"] = first["data"], {"frozen": BOTTOM}
    second["start"] = {"from": str(tmp_path / "a/run")}
    with pytest.raises(RanksFailed, match=r"11 dtype: blocks.1.attn_norm.weight \(F32 there, BF16 here\)"):
        train(second, 2)  # a trained tensor would be rounded
    second["start"]["allow"] = {"dtype": ["*"]}
    assert train(second, 2) == [0, 0]
    for step in (1, 4):
        ended = stored(tmp_path / "b/run", step)
        assert all(ended.same(began, n) for n in began.tensors if is_bottom(n) and n in began.parameters)
        assert ended.tensors["head.weight"].dtype == torch.bfloat16


def test_links_within_an_attempt_and_fresh_copies_between(tmp_path: Path) -> None:
    first = config_of(tmp_path / "a", train__steps=2)
    assert train(first, 2) == [0, 0]
    second = config_of(tmp_path / "b", train__steps=5, checkpoint__every_steps=1)
    second["data"], second["freeze"] = first["data"], {"frozen": BOTTOM}
    second["start"] = {"from": str(tmp_path / "a/run"), "take": "everything"}
    assert train(second, 2) == [0, 0]
    second["train"]["steps"] = 7
    assert train(second, 1) == [0]

    def inodes(step: int) -> dict[str, int]:
        folder = tmp_path / f"b/run/checkpoints/step-{step:08d}"
        carried = [*folder.glob("frozen/*"), *folder.glob("optim/carried-*")]
        return {str(p.relative_to(folder)): os.stat(p).st_ino for p in carried}

    assert len({p.split("/")[0] for p in inodes(3)}) == 2  # weights and optimizer state
    assert inodes(3) == inodes(4) == inodes(5)
    assert inodes(6) == inodes(7)
    assert inodes(5).keys() == inodes(6).keys()
    assert not set(inodes(5).values()) & set(inodes(6).values())


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.full), 2])
def test_reference_leaves_frozen_parameters_where_they_are(size: int, tmp_path: Path) -> None:
    first = config_of(tmp_path / "a", train__steps=2)
    assert train(first, 2) == [0, 0]
    second = config_of(tmp_path / "b", train__steps=4, checkpoint__every_steps=1, checkpoint__frozen="reference")
    second["data"], second["freeze"] = first["data"], {"frozen": ["embed.*", "blocks.*"]}
    second["start"] = {"from": str(tmp_path / "a/run")}
    assert train(second, size) == [0] * size
    ended = tmp_path / "b/run/checkpoints/step-00000004"
    assert not list(ended.glob("frozen/*"))
    content = read_json(ended / "manifest.json")
    assert [source["path"] for source in content["sources"]] == [str(tmp_path / "a/run/checkpoints/step-00000002")]
    second["train"]["steps"] = 6
    assert train(second, 3 - size) == [0] * (3 - size)
    # After unfreezing elsewhere the checkpoint is whole again.
    third = config_of(tmp_path / "c", train__steps=7, checkpoint__every_steps=1)
    third["data"], third["start"] = first["data"], {"from": str(tmp_path / "b/run"), "take": "everything"}
    assert train(third, 2) == [0, 0]
    assert not read_json(tmp_path / "c/run/checkpoints/step-00000007/manifest.json").get("sources")
    # The run that owns the checkpoint does not prune it.
    source = tmp_path / "a/run/checkpoints/step-00000002"
    assert (source / "KEEP").read_text() == f"{tmp_path / 'b/run/checkpoints'} refers to files in here\n"
    first["train"]["steps"], first["checkpoint"] = 5, {"every_steps": 1, "keep": {"last": 1, "best": False}}
    assert train(first, 1) == [0]
    assert RunFolder(tmp_path / "a/run").committed_steps() == [2, 5]
    # A source that is gone is named.
    (source / "model").rename(tmp_path / "gone")
    second["train"]["steps"] = 8
    with pytest.raises(RanksFailed, match=r"step-00000002/model.*: the file is missing"):
        train(second, 1)


def held(folder: Path) -> tuple[dict[str, torch.dtype], str]:
    """Build an engine that computes in bf16, with the bottom's originals elsewhere. Returns the number formats in
    memory, and the error of a store that carries nothing."""
    from configs.config import Config
    from trainer.checkpoint.save.assemble import RunState
    from trainer.checkpoint.save.store import CheckpointStore
    from trainer.engines.fsdp import FsdpEngine
    from trainer.ranks.world import leave, start
    from trainer.tasks.lm import LanguageModelling

    config = Config.model_validate(tiny(folder, precision__compute="bf16"))
    world = start(config)
    engine = FsdpEngine(config, world, LanguageModelling(config.task))
    names = set(engine.parameters())
    engine.set_trainable({n for n in names if not is_bottom(n)}, held_elsewhere={n for n in names if is_bottom(n)})
    engine.initialise(0)
    store = CheckpointStore(folder / "checkpoints", world.rank, world.size, world.kv)
    try:
        store.save(1, engine.pieces(), RunState())
    except ValueError as error:
        said = str(error)
    formats = {piece.key: piece.tensor.dtype for piece in engine.pieces()}
    world.barrier()  # rank 0 holds the store to which the other rank's saver still connects
    leave()
    return formats, said


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.full), 2])
def test_frozen_parameters_take_half_the_memory_once_a_file_holds_them(size: int, tmp_path: Path) -> None:
    for formats, said in run_ranks(size, held, tmp_path):
        assert {n: dtype for n, dtype in formats.items() if is_bottom(n)} == {
            n: torch.bfloat16 for n in formats if is_bottom(n)
        }
        assert {dtype for n, dtype in formats.items() if not is_bottom(n)} == {torch.float32}
        assert "neither the original is here nor a checkpoint that holds it" in said  # a copy is never saved
