"""`start.from` with differences that are wanted: a grown vocabulary, a new head, other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import RanksFailed, tiny, train
from tests.stored import Stored, bits


def stored(folder: Path, step: int) -> Stored:
    return Stored(folder / f"run/checkpoints/step-{step:08d}")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = tiny(tmp_path_factory.mktemp("first"), train__steps=3, optim__schedule="constant")
    assert train(config, 2) == [0, 0]
    return config


def second(folder: Path, first: dict[str, Any], lr: float = 1e-30, **changes: Any) -> dict[str, Any]:
    """A run of one step from everything of the first run. Its learning rate changes nothing unless a test sets it."""
    config = tiny(folder, train__steps=4, optim__schedule="constant", optim__lr=lr, **changes)
    config["optim"]["weight_decay"] = 0.0
    config["data"] = first["data"]
    config.setdefault("start", {})
    config["start"] |= {"from": first["run"]["dir"], "take": "everything"}
    return config


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.full), 3])
def test_a_grown_vocabulary_keeps_old_rows_and_their_moments(size: int, first: dict[str, Any], tmp_path: Path) -> None:
    grown = {"start__allow": {"reshaped": ["embed.weight", "head.weight"]}}
    config = second(tmp_path, first, model__vocab_size=267, optim__betas=[1 - 2**-24, 1 - 2**-24], **grown)
    assert train(config, size) == [0] * size
    before, after = Stored(Path(first["run"]["dir"]) / "checkpoints/step-00000003"), stored(tmp_path, 4)
    assert after.manifest["step_counts"]["embed.weight"] == 4
    for name in ("embed.weight", "head.weight"):
        old, new = before.tensors[name], after.tensors[name]
        assert new.shape == (267, 32)
        assert bits(new[:260]) == bits(old)
        assert 0.01 < new[260:].std() < 0.03  # initial values, not zeros
        moment = after.tensors[f"{name}.exp_avg"]
        # With betas of almost 1, one update leaves the moments unchanged, up to rounding.
        torch.testing.assert_close(moment[:260], before.tensors[f"{name}.exp_avg"], rtol=1e-5, atol=1e-8)
        assert moment[260:].abs().max() < 1e-6
    # The new rows equal those of a fresh model of this size.
    fresh = tiny(tmp_path / "fresh", train__steps=1, model__vocab_size=267, optim__lr=1e-30)
    fresh["optim"]["weight_decay"] = 0.0
    assert train(fresh) == [0]
    assert bits(stored(tmp_path / "fresh", 1).tensors["embed.weight"][260:]) == bits(
        after.tensors["embed.weight"][260:]
    )


def test_a_replaced_head_begins_anew_and_counts_from_0(first: dict[str, Any], tmp_path: Path) -> None:
    config = second(tmp_path, first, start__allow={"replaced": ["head.*"]})
    assert train(config, 2) == [0, 0]
    before, after = Stored(Path(first["run"]["dir"]) / "checkpoints/step-00000003"), stored(tmp_path, 4)
    assert not after.same(before, "head.weight")
    assert after.same(before, "embed.weight")
    counts = after.manifest["step_counts"]
    assert counts["head.weight"] == 1
    assert counts["embed.weight"] == 4


def test_a_frozen_tensor_goes_by_another_name(first: dict[str, Any], tmp_path: Path) -> None:
    """The blocks swap places, and one of them is frozen: its weights and moments are carried under the new name."""
    swap = {"blocks.0.*": "blocks.1.*", "blocks.1.*": "blocks.0.*"}
    config = second(tmp_path, first, start__rename=swap, freeze__frozen=["blocks.1.*"], checkpoint__every_steps=1)
    assert train(config, 2) == [0, 0]
    before, after = Stored(Path(first["run"]["dir"]) / "checkpoints/step-00000003"), stored(tmp_path, 4)
    assert after.tensors.keys() == before.tensors.keys()
    for key in before.tensors:
        if key.startswith("blocks.1."):
            other = key.replace("blocks.1.", "blocks.0.")
            assert bits(after.tensors[key]) == bits(before.tensors[other]), key
    assert bits(after.tensors["blocks.0.mlp.up.weight"]) == bits(before.tensors["blocks.1.mlp.up.weight"])
    assert after.manifest["step_counts"]["blocks.1.mlp.up.weight"] == 3
    config["train"]["steps"] = 5
    assert train(config, 1) == [0]  # a continued run needs no renaming
    again = stored(tmp_path, 5)
    assert all(again.same(after, key) for key in after.tensors if key.startswith("blocks.1."))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__vocab_size": 267}, "2 reshaped: embed.weight"),
        ({"model__layers": 3}, "9 missing: blocks.2.attn_norm.weight"),
        ({"model__tie_embeddings": True}, "unexpected: head.weight"),
        ({"optim__name": "sgd"}, "missing: .*momentum_buffer"),
        ({"start__allow": {"missing": ["nothing.*"]}}, "start.allow.missing: 'nothing.*' matches nothing"),
        ({"start__rename": {"embed.*": "head.*"}}, "would both be head.weight"),
        ({"start__rename": {"embedding.*": "embed.*"}}, "matches no tensor of the checkpoint"),
        ({"freeze__schedule": [{"step": 2, "frozen": ["embd.*"]}]}, "step 2.frozen: 'embd.*' matches no parameter"),
        ({"freeze__schedule": [{"step": 2, "frozen": ["*"]}]}, "step 2.frozen: every parameter is frozen"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    changes: dict[str, Any], words: str, first: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RanksFailed, match=words):
        train(second(tmp_path, first, **changes), 1)
    assert not (tmp_path / "run/checkpoints").exists()
