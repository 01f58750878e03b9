"""Learning-rate schedules, optimizers at any world size, groups."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.schema.model import DecoderSection
from configs.schema.optim import OptimSection
from models import build_model
from tests.distributed import tiny, train
from tests.test_train import losses
from trainer.engines.optim import Muon, add_penalties, build_optimizers
from trainer.schedule import lr_factor

SCHEDULES = ["cosine", "linear", "wsd", "constant"]
DECODER = build_model(DecoderSection(vocab_size=4, dim=2, layers=1, heads=1, mlp_dim=1, max_seq_len=2))


@given(st.sampled_from(SCHEDULES), st.integers(0, 50), st.integers(60, 500), st.floats(0, 1), st.integers(1, 100))
def test_schedules_rise_to_the_peak_and_end_low(schedule: str, warmup: int, last: int, low: float, decay: int) -> None:
    optim = OptimSection.model_validate(
        {"schedule": schedule, "warmup_steps": warmup, "final_lr_ratio": low, "decay_steps": decay}
    )
    factors = [lr_factor(optim, step, last) for step in range(1, last + 1)]
    assert factors[:warmup] == [step / warmup for step in range(1, warmup + 1)]
    after = factors[warmup:]
    assert all(low - 1e-9 <= f <= 1 for f in after)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    assert after[-1] == pytest.approx(1.0 if schedule == "constant" else low, abs=1e-9)
    if schedule == "wsd":
        assert all(f == 1.0 for f in after[: max(last - warmup - decay, 0)])


def test_cosine_is_the_formula() -> None:
    optim = OptimSection(schedule="cosine", warmup_steps=10, final_lr_ratio=0.1)
    assert lr_factor(optim, 60, 110) == pytest.approx(0.1 + 0.9 * 0.5)


def test_norms_and_biases_do_not_decay() -> None:
    named = {"blocks.0.w": torch.zeros(3, 3), "blocks.0.norm": torch.zeros(3), "head.bias": torch.zeros(2)}
    for tensor in named.values():
        tensor.requires_grad_()
    (optimizer,) = build_optimizers(OptimSection(weight_decay=0.3), DECODER, named)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decay[id(p)] for p in named.values()] == [0.3, 0.0, 0.0]


@pytest.mark.parametrize(("l1", "l2"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2), (0.0, 0.0)])
def test_penalties_are_the_gradient_of_what_they_say(l1: float, l2: float) -> None:
    """Only for matrices. A missing gradient stays missing."""
    draw = torch.Generator().manual_seed(0)
    named = {
        name: torch.randn(shape, generator=draw).requires_grad_()
        for name, shape in {"blocks.0.w": (3, 2), "blocks.0.norm": (3,), "frozen.w": (2, 2)}.items()
    }
    loss = sum(named[name].square().sum() for name in ("blocks.0.w", "blocks.0.norm"))
    weight = named["blocks.0.w"]
    penalised = loss + l1 * weight.abs().sum() + l2 / 2 * weight.square().sum()
    expected = torch.autograd.grad(penalised, [weight, named["blocks.0.norm"]], retain_graph=True)
    loss.backward()
    add_penalties(OptimSection(l1=l1, l2=l2), DECODER, named)
    torch.testing.assert_close([weight.grad, named["blocks.0.norm"].grad], list(expected))
    assert named["frozen.w"].grad is None


def test_l2_is_sgds_own_weight_decay_also_where_matrices_are_sharded(tmp_path: Path) -> None:
    found = []
    for size, key in ((1, "weight_decay"), (2, "l2")):
        optim = {"name": "sgd", "lr": 0.5, "momentum": 0.5, "weight_decay": 0.0, key: 0.2}
        config = tiny(tmp_path / str(size), optim=optim, train__clip_norm=None)
        assert train(config, size) == [0] * size
        found.append(losses(config))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][-1] < found[0][0] - 0.1


def test_muon_takes_the_blocks_matrices_alone() -> None:
    shapes = {"embed.weight": (4, 3), "blocks.0.w": (3, 3), "blocks.0.norm": (3,), "head.weight": (4, 3)}
    named = {k: torch.zeros(v, requires_grad=True) for k, v in shapes.items()}
    adamw, muon = build_optimizers(OptimSection(name="muon"), DECODER, named)
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(named["blocks.0.w"])]
    assert sum(len(g["params"]) for g in adamw.param_groups) == 3


def test_muon_agrees_with_torchs_own() -> None:
    """torch.optim.Muon on a whole matrix: the same updates, except for bf16 rounding in the iteration."""
    torch.manual_seed(0)
    start, grads = torch.randn(24, 16), [torch.randn(24, 16) for _ in range(4)]
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    mine = Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1)
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        reference.step()
    assert (ours - theirs).abs().max() < 2e-3  # updates are 0.02 in size, bf16 keeps 8 bits of each
    assert (ours - start).abs().max() > 0.02


# Muon iterates in bf16 (8 bits), so the order in which a gradient was summed changes its updates by up to 1e-3.
TOLERANCES = {"adamw": 2e-5, "adam": 2e-5, "sgd": 2e-5, "muon": 5e-3}


@pytest.mark.parametrize("name", ["adamw", "muon", *(pytest.param(n, marks=pytest.mark.full) for n in ("adam", "sgd"))])
def test_an_optimizer_gives_the_same_on_two_ranks(name: str, tmp_path: Path) -> None:
    found = []
    for size in (1, 2):
        config = tiny(tmp_path / str(size), optim__name=name, train__steps=4, checkpoint__every_steps=2)
        assert train(config, size) == [0] * size
        config["train"]["steps"] = 6  # its state goes through a checkpoint
        assert train(config, 3 - size) == [0] * (3 - size)
        found.append(losses(config))
    assert len(found[0]) == 6
    assert found[0] == pytest.approx(found[1], abs=TOLERANCES[name])
    assert found[0][-1] < found[0][0]
