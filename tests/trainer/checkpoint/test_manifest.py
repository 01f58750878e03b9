"""A manifest is accepted only if it agrees with itself, whatever its digest, and all readers decide alike."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_faults import signed, whole

from configs.errors import UserError
from configs.schema.checkpoint import KeepSection
from launch.checkpoint import main
from launch.checkpoint.convert.convert import convert, open_state
from tests.fuzz.targets import SAVED, manifest_signed, sealed
from trainer.begin import named_checkpoint
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.format.facts import LOOP
from trainer.checkpoint.format.files import parse_header
from trainer.checkpoint.format.manifest import Manifest, decode, decode_checksums, digest
from trainer.checkpoint.keep.recover import recover
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore
from trainer.progress import Progress

Change = Callable[[dict[str, Any]], object]


def save(run: Path, *steps: int) -> None:
    """Save checkpoints as a run does."""
    run.mkdir()
    store = CheckpointStore(run / "checkpoints", asynchronous=False, keep=KeepSection(last=9))
    for step in steps:
        state = RunState(
            position={"consumed_samples": 8 * step},
            loop=Progress(step, 8 * step, best_score=0.5).state(),
            layout={"engine": "fsdp", "replicate": 1, "shard": 1, "tensor": 1},
            step_counts={"a": step},
        )
        pieces = [whole("a", "model", torch.full((4,), float(step))), whole("a.exp_avg", "optim", torch.ones(4))]
        store.save(step, pieces, state, metric=0.5)
        assert [result.error for result in store.poll()] == [None]


def resign(run: Path, step: int, change: Change) -> None:
    path = run / f"checkpoints/step-{step:08d}/manifest.json"
    told = json.loads(path.read_bytes())
    change(told)
    path.write_bytes(signed(told))


EDITS: dict[str, tuple[Change, str]] = {
    "another step": (lambda m: m["loop"].update(step=1), "loop.step is 1, but step is 2"),
    "true": (lambda m: m["loop"].update(step=True), "loop.step"),
    "text": (lambda m: m["loop"].update(step="2"), "loop.step"),
    "null": (lambda m: m["loop"].update(step=None), "loop.step"),
    "a float": (lambda m: m["loop"].update(step=2.0), "loop.step"),
    "huge": (lambda m: m["loop"].update(step=10**30), "loop.step"),
    "negative": (lambda m: m["loop"].update(step=-2), "loop.step"),
    "an empty loop": (lambda m: m.update(loop={}), "loop.step is missing"),
    "no loop": (lambda m: m.pop("loop"), "loop.step is missing"),
    "a part of the loop gone": (lambda m: m["loop"].pop("best_loss"), "loop.best_loss is missing"),
    "samples of the beginning": (lambda m: m["loop"].update(consumed_samples=0), "position.consumed_samples is 16"),
    "another position": (lambda m: m["position"].update(consumed_samples=8), "position.consumed_samples is 8"),
    "an empty position": (lambda m: m.update(position={}), "position.consumed_samples is missing"),
    "something beside the position": (lambda m: m["position"].update(epoch=1), "position.epoch"),
    "a loss of text": (lambda m: m["loop"].update(best_loss="x"), "loop.best_loss"),
    "another loss": (lambda m: m["loop"].update(best_loss=0.25), "loop.best_loss is 0.25, but metric is 0.5"),
    "validated later": (lambda m: m["loop"].update(validated_step=3), "loop.validated_step is 3"),
    "a format that is true": (lambda m: m.update(format=True), "format"),
    "a step that is a float": (lambda m: m.update(step=2.0), "step"),
    "saved after all dates": (lambda m: m.update(saved_s=1e300), "saved_s"),
    "saved before all dates": (lambda m: m.update(saved_s=-1.0), "saved_s"),
    "a fingerprint that is none": (lambda m: m.update(fingerprint="\x1b[2J"), "fingerprint"),
    "data by number": (lambda m: m.update(data={"words": 7}), "data.words"),
    "data by pattern": (lambda m: m.update(data={"words": "**"}), "data.words"),
    "a layout of lists": (lambda m: m["layout"].update(shard=[1]), "layout.shard"),
    "converted from a number": (lambda m: m.update(config={"converted_from": 5}), "config.converted_from"),
    "an optimizer that is a number": (lambda m: m.update(config={"optim": 5}), "config.optim"),
    "an alias of optimizer state": (lambda m: m.update(aliases={"b": "a.exp_avg"}), "b cannot be another name"),
    "updates of optimizer state": (lambda m: m.update(step_counts={"a.exp_avg": 2}), "step_counts"),
    "trained later": (lambda m: m["tensors"]["a"].update(trained_step=3), "trained_step 3 of 2"),
    "never trained": (lambda m: m["tensors"]["a"].update(trained_step=None), "trained_step None"),
    "state that was trained": (lambda m: m["tensors"]["a.exp_avg"].update(trained_step=2), "trained_step 2"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_all_who_read_it_refuse_it_alike(tmp_path: Path, edit: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    save(run, 1, 2)
    change, reason = EDITS[edit]
    resign(run, 2, change)
    newest = run / "checkpoints/step-00000002"
    for read in (
        lambda: Checkpoint(newest),
        lambda: recover(newest, newest.parent, (), print),
        lambda: convert(newest, tmp_path / "out", "torch"),
        lambda: open_state(newest),
    ):
        with pytest.raises((BadCheckpoint, UserError), match=r"manifest\.json|not of format 1"):
            read()
    with pytest.raises(UserError, match=r"start\.from: .*manifest\.json"):
        named_checkpoint(run)
    assert main(["verify", str(run)]) == 1
    assert reason in capsys.readouterr().out
    assert main(["list", str(run)]) == 1
    assert "bad: manifest.json" in capsys.readouterr().out
    with pytest.raises(UserError):
        main(["show", str(newest)])
    said: list[str] = []
    shelf = CheckpointStore(run / "checkpoints", keep=KeepSection(last=1), say=said.append).shelf
    assert shelf.going() == []  # nothing is pruned while the newest is bad
    found = shelf.newest_good()
    assert found is not None
    assert Progress.of(found.manifest) == Progress(1, 8, best_score=0.5)
    assert (run / "checkpoints/step-00000002.bad-0").is_dir()
    assert reason in said[-1]


def test_what_no_run_wrote_has_no_loop() -> None:
    """Such as the golden checkpoint, or a converted one: step and position are the manifest's own."""
    told = {"step": 500, "position": {"consumed_samples": 4000}, "loop": {"best_loss": 2.5, "nonfinite": 0}}
    empty = {"files": [], "partitions": [], "tensors": {}, "checksums": "0" * 32}
    found = decode("m", sealed(json.dumps(told | empty).encode()))
    assert Progress.of(found) == Progress(500, 4000, best_score=2.5)
    assert Progress.of(Manifest(step=7, **empty)) == Progress(7)


def test_the_loop_is_written_down_once() -> None:
    assert list(LOOP) == list(Progress().state())
    assert len(LOOP) == len(fields(Progress))
    state = Progress(3, 24, 1, 2, best_score=-0.75, validations_without_better=2)
    assert state.state()["best_loss"] == -0.75  # the name in format 1
    told = {"step": 3, "position": {"consumed_samples": 24}, "loop": state.state(), "files": [], "partitions": []}
    assert Progress.of(Manifest(tensors={}, checksums="0" * 32, **told)) == state


def twice(text: bytes, key: str, value: str) -> bytes:
    """The same key and value once more, right after it."""
    one = f'"{key}":{value}'.encode()
    assert text.count(one) == 1
    return text.replace(one, one + b"," + one)


TWINS = {"step": "4", "words": '"6237786a05521024ec5c07548f027446"', "lr": "0.001", "blocks.0.mlp.up.weight": "4"}


@pytest.mark.parametrize("key", TWINS)
def test_a_key_that_stands_twice_is_refused(key: str) -> None:
    text = twice(SAVED, key, TWINS[key]) if key != "step" else SAVED.replace(b'"step":4,', b'"step":4,"step":4,', 1)
    with pytest.raises(BadCheckpoint, match=rf"the key '{key}' stands twice"):
        decode("m", sealed(text))


def test_a_key_that_stands_twice_is_refused_in_the_other_files() -> None:
    table = b'{"block_bytes":4194304,"block_bytes":4194304,"xxh3_64":{}}'
    known = Manifest(step=0, files=[], partitions=[], tensors={}, checksums=digest(table))
    with pytest.raises(BadCheckpoint, match="the key 'block_bytes' stands twice"):
        decode_checksums("c", table, known, 4194304)
    header = b'{"a":{"dtype":"I8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'
    with pytest.raises(BadCheckpoint, match="the key 'dtype' stands twice"):
        parse_header("f", len(header).to_bytes(8, "little") + header, 8 + len(header))


def test_a_key_that_stands_twice_is_refused_in_what_a_conversion_keeps(tmp_path: Path) -> None:
    save(tmp_path / "run", 2)
    convert(tmp_path / "run", tmp_path / "two.pt", "torch")
    raw = torch.load(tmp_path / "two.pt", weights_only=True)
    raw["muster"] = raw["muster"].replace('"step": 2', '"step": 2, "step": 1', 1)
    torch.save(raw, tmp_path / "three.pt")
    with pytest.raises(UserError, match="is not what Muster writes there"):
        open_state(tmp_path / "three.pt")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    SCALARS | st.sampled_from([0, 1, 2, 3, 4, 5, 32, 4.0, 1e300, 10**30, 1 << 62, "4", "../x", "\x1b[2J"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(node: Any, at: tuple[Any, ...] = ()) -> typing.Iterator[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        yield (*at, key)
        yield from places(value, (*at, key))


TREE = json.loads(SAVED)
PLACES = sorted(places(TREE), key=lambda at: (len(at), str(at)))


def value_at(at: tuple[Any, ...]) -> Any:
    node = TREE
    for key in at:
        node = node[key]
    return node


# The places that much depends on are drawn as often as all others together.
SHALLOW = [at for at in PLACES if at[0] not in ("config", "model", "files", "partitions", "tensors")]


@given(st.sampled_from(PLACES) | st.sampled_from(SHALLOW), ANYTHING | st.sampled_from(PLACES).map(value_at))
@settings(max_examples=400)
def test_one_field_replaced_and_signed_again(at: tuple[Any, ...], value: Any) -> None:
    """It is read as what it says, or raises BadCheckpoint. Step and position never change."""
    manifest_signed(json.dumps({"at": at, "value": value}).encode())


def test_one_field_left_out_and_signed_again() -> None:
    """Each field in turn: it is refused, or step and position stay the same."""
    read = 0
    for at in PLACES:
        tree = json.loads(SAVED)
        node = tree
        for key in at[:-1]:
            node = node[key]
        del node[at[-1]]
        try:
            found = decode("m", sealed(json.dumps(tree).encode()))
        except BadCheckpoint:
            continue
        read += 1
        assert (Progress.of(found).step, Progress.of(found).consumed_samples) == (4, 32), at
    assert 0 < read < len(PLACES)
