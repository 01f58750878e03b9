"""The load plan: every tensor ends in one place, and a difference is refused unless the config names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema.start import StartSection
from trainer.checkpoint.format.manifest import FlatPiece, Manifest, Partition
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.load.plan import Plan, Target, TensorInfo, plan
from trainer.checkpoint.load.rename import rename_all
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore

ADAM = ("exp_avg", "exp_avg_sq")
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """w trained (4 updates). f was frozen after 2 updates. g is frozen and never trained. new trains only since now. b
    is a buffer, and head has the second name tied."""
    store = CheckpointStore(tmp_path_factory.mktemp("plan") / "checkpoints", asynchronous=False)

    def whole(key: str, group: Any) -> Piece:
        return Piece(key, group, torch.ones(4), (4,), (0,), (4,))

    weights = [whole(name, "model") for name in ("w", "new", "b", "head")] + [
        whole("f", "frozen"),
        whole("g", "frozen"),
    ]
    moments = [whole(f"{name}.{key}", "optim") for name in ("w", "f", "head") for key in ADAM]
    state = RunState(
        aliases={"tied": "head"}, buffers=["b"], stateless=["new"], step_counts={"w": 4, "f": 2, "head": 4}
    )
    store.save(4, [*weights, *moments], state)
    assert store.wait()[0].ok
    return Checkpoint(store.shelf.path(4)).manifest


def make(manifest: Manifest, trains: str, everything: bool = True, **start: Any) -> Plan:
    """The plan for a run in which `trains` of w, f, g, new, head train. `start` may also change shapes and dtypes."""
    shapes, dtypes = start.pop("shapes", {}), start.pop("dtypes", {})
    names = start.pop("names", "w f g new head b").split()
    tensors = {n: TensorInfo(shapes.get(n, (4,)), dtypes.get(n, FP32)) for n in names}
    trained = trains.split()
    keys = start.pop("keys", ADAM)
    target = Target(tensors, frozenset({"b"} & set(names)), dict.fromkeys(trained, keys), frozenset(trained))
    return plan(manifest, target, everything, StartSection.model_validate(start))


def test_the_same_freezing_finds_everything(manifest: Manifest) -> None:
    found = make(manifest, "w new head")
    found.refuse()
    assert found.read.keys() == {"w", "f", "g", "new", "head", "b"} | {f"{n}.{k}" for n in ("w", "head") for k in ADAM}
    assert found.carried.keys() == {"f", "f.exp_avg", "f.exp_avg_sq", "g"}
    assert found.begins == ["new"]
    assert found.counts == {"w": 4, "head": 4, "f": 2}
    assert found.notes == {}
    assert not found.fresh


def test_every_stored_tensor_has_exactly_one_place(manifest: Manifest) -> None:
    """Whatever trains now, each one is read for the engine or carried. None is dropped and none invented."""
    for trains in ("w", "f", "g", "w f", "w f g new head", "new", "head g"):
        found = make(manifest, trains)
        found.refuse()
        state = {key for key, tensor in manifest.tensors.items() if tensor.group == "optim"}
        assert {key for key in found.read if key in state} | (found.carried.keys() & state) == state
        assert not (found.read.keys() & state) & found.carried.keys()
        assert {n for n in manifest.tensors if n not in state} == found.read.keys() - state
        assert set(found.begins) == set(trains.split()) & {"g", "new"}


def test_freezing_that_changed_is_said(manifest: Manifest) -> None:
    found = make(manifest, "f new")
    assert found.notes == {"frozen now": {"w": "", "head": ""}, "trains now": {"f": ""}}
    assert any("trains now" in line for line in found.lines())


def test_weights_alone_ask_for_no_state(manifest: Manifest) -> None:
    found = make(manifest, "w f g", everything=False)
    assert found.read.keys() == {"w", "f", "g", "new", "head", "b"}
    assert found.carried.keys() == {"new", "head"}
    assert found.counts == {}
    assert found.begins == []


@pytest.mark.parametrize(
    ("changes", "allow", "words"),
    [
        ({"names": "w f g new head b extra"}, {"missing": ["extra"]}, r"1 missing: extra \(\[4\]\)"),
        ({"names": "w f g new b"}, {"unexpected": ["head*"]}, r"1 unexpected: head \(\[4\]\)"),
        ({"shapes": {"w": (6,)}}, {"reshaped": ["w"]}, r"1 reshaped: w \(\[4\] there, \[6\] here\)"),
        ({"dtypes": {"w": BF16}}, {"dtype": ["w"]}, r"3 dtype: w \(F32 there, BF16 here\), w.exp_avg"),
        (
            {"keys": ("momentum_buffer",)},
            {"missing": ["w"], "unexpected": ["w"]},
            r"1 missing: w.momentum_buffer .*; 2 unex",
        ),
    ],
)
def test_a_difference_is_refused_unless_named(
    manifest: Manifest, changes: dict[str, Any], allow: dict[str, list[str]], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        make(manifest, "w", **changes).refuse()
    make(manifest, "w", **changes, allow=allow).refuse()
    for kind in allow:
        with pytest.raises(UserError, match=words):
            make(manifest, "w", **changes, allow={kind: []}).refuse()
    with pytest.raises(UserError, match=rf"start.allow.{next(iter(allow))}: 'typo' matches nothing"):
        make(manifest, "w", **changes, allow={next(iter(allow)): ["typo"]})


def test_a_grown_tensor_keeps_its_rows_and_their_state(manifest: Manifest) -> None:
    found = make(manifest, "head", shapes={"head": (6,)}, allow={"reshaped": ["head"]})
    assert found.partial == {"head", "head.exp_avg", "head.exp_avg_sq"}
    assert found.fresh == {"head"}
    assert found.counts["head"] == 4
    with pytest.raises(UserError, match=r"another number of dimensions: head"):
        make(manifest, "head", shapes={"head": (2, 2)}, allow={"reshaped": ["head"]}).refuse()


def test_a_replaced_tensor_begins_anew(manifest: Manifest) -> None:
    found = make(manifest, "w head", allow={"replaced": ["head"]})
    found.refuse()
    assert found.fresh == {"head"}
    assert found.begins == ["head"]
    assert not any(key.startswith("head") for key in [*found.read, *found.carried])


def test_lost_state_is_not_taken_for_new(manifest: Manifest) -> None:
    """A trained parameter whose state is missing is refused, and does not silently begin at 0."""
    without = {key: tensor for key, tensor in manifest.tensors.items() if not key.startswith("w.exp")}
    broken = manifest.model_copy(update={"tensors": without})
    with pytest.raises(UserError, match=r"missing: w.exp_avg \(optimizer state\)"):
        make(broken, "w").refuse()
    counts = {name: n for name, n in manifest.step_counts.items() if name != "w"}
    with pytest.raises(UserError, match=r"missing: w.step \(the count of its updates\)"):
        make(manifest.model_copy(update={"step_counts": counts}), "w").refuse()


def test_state_of_another_shape_is_refused(manifest: Manifest) -> None:
    """It must not be read into a place that it does not fill."""
    flat = Partition(shape=[2, 2], pieces=[FlatPiece(file=0, start=0, length=4)])
    moved = manifest.tensors["w.exp_avg"].model_copy(update={"partition": len(manifest.partitions)})
    changes = {"partitions": [*manifest.partitions, flat], "tensors": manifest.tensors | {"w.exp_avg": moved}}
    with pytest.raises(UserError, match=r"of another shape than its parameter: w.exp_avg \(\[2, 2\], \[4\]\)"):
        make(manifest.model_copy(update=changes), "w").refuse()


def test_a_wider_format_is_exact_and_only_said(manifest: Manifest) -> None:
    found = make(manifest, "w", dtypes=dict.fromkeys(("w", "f"), torch.float64))
    found.refuse()
    assert found.notes["widened"].keys() == {"w", "w.exp_avg", "w.exp_avg_sq"}
    frozen = make(manifest, "w", dtypes={"f": BF16})
    frozen.refuse()  # only the copy in memory of a frozen tensor is rounded
    assert "f" in frozen.carried


def test_an_untied_name_finds_the_tied_tensor(manifest: Manifest) -> None:
    found = make(manifest, "w", names="w f g new tied b")
    found.refuse()
    assert found.read["tied"] == "head"
    assert found.carried["tied.exp_avg"] == "head.exp_avg"


def test_renamed(manifest: Manifest) -> None:
    names = "body.w body.f g new head b"
    found = make(manifest, "body.w", names=names, rename={"w": "body.w", "f": "body.f"})
    found.refuse()
    assert found.read["body.w.exp_avg"] == "w.exp_avg"
    assert found.carried["body.f.exp_avg"] == "f.exp_avg"
    assert found.counts["body.w"] == 4
    with pytest.raises(UserError, match=r"start.rename: 'x.\*' matches no tensor"):
        make(manifest, "w", rename={"x.*": "y.*"})
    with pytest.raises(UserError, match=r"(f and w|w and f) would both be w"):
        make(manifest, "w", rename={"f": "w"})


def test_rules_of_renaming() -> None:
    rules = {"transformer.h.*.attn.*": "blocks.*.attention.*", "transformer.*": "*"}
    names = ["transformer.h.0.attn.w", "transformer.norm", "head"]
    assert rename_all(rules, names) == {
        "transformer.h.0.attn.w": "blocks.0.attention.w",
        "transformer.norm": "norm",
        "head": "head",
    }
    with pytest.raises(UserError, match="same number"):
        rename_all({"a.*": "b"}, ["a.1"])


@given(st.lists(st.text("ab.*+[", min_size=1, max_size=6), unique=True, min_size=1, max_size=8))
def test_renaming_to_itself_changes_nothing(names: list[str]) -> None:
    assert rename_all({"*": "*"}, names) == {name: name for name in names}


def test_orphaned_state_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", asynchronous=False)
    pieces = [
        Piece(key, "optim" if "exp" in key else "model", torch.ones(4), (4,), (0,), (4,)) for key in ("w", "x.exp_avg")
    ]
    store.save(1, pieces, RunState())
    orphan = Checkpoint(store.shelf.path(1)).manifest
    with pytest.raises(UserError, match="unexpected: x"):
        plan(orphan, Target({"w": TensorInfo((4,), FP32)}), True).refuse()
