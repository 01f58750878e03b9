"""The multilayer perceptron: shapes, initial weights, what an engine is told about it, FLOPs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.schema.model import MlpSection
from models.base import Model
from models.build import build_model


def model_of(**overrides: Any) -> Model:
    return build_model(MlpSection(**{"name": "mlp", "features": 6, "hidden": [16, 8], "outputs": 3, **overrides}))


def filled(model: Model, seed: int = 0) -> Model:
    for name, parameter in model.module.named_parameters():
        model.initialise(name, parameter, torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("norm", ["none", "layernorm"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("hidden", [[], [5], [16, 8]])
def test_it_is_what_torch_computes(norm: str, activation: str, hidden: list[int]) -> None:
    model = filled(model_of(norm=norm, activation=activation, hidden=hidden))
    weights = dict(model.module.named_parameters())
    features = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    x = features
    for i in range(len(hidden)):
        x = x @ weights[f"blocks.{i}.linear.weight"].T + weights[f"blocks.{i}.linear.bias"]
        if norm == "layernorm":
            x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        x = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "tanh": torch.tanh}[activation](x)
    expected = x @ weights["head.weight"].T + weights["head.bias"]
    torch.testing.assert_close(model.module(features), expected)


def test_dropout_is_for_training_alone() -> None:
    model, features = filled(model_of(dropout=0.5)), torch.ones(2, 6)
    torch.manual_seed(0)
    assert not torch.equal(model.module(features), model.module(features))
    model.module.eval()
    assert torch.equal(model.module(features), model.module(features))


def test_features_come_in_fp32_whatever_it_computes_in() -> None:
    for hidden in ([], [16]):
        assert filled(model_of(hidden=hidden)).module.bfloat16()(torch.ones(2, 6)).dtype == torch.bfloat16


@pytest.mark.parametrize(("activation", "std"), [("relu", math.sqrt(2 / 400)), ("tanh", math.sqrt(2 / 700))])
def test_initial_weights(activation: str, std: float) -> None:
    model = filled(model_of(features=400, hidden=[300], activation=activation, norm="layernorm"), seed=3)
    weights = dict(model.module.named_parameters())
    assert weights["blocks.0.linear.weight"].std().item() == pytest.approx(std, rel=0.02)
    assert weights["head.weight"].std().item() == pytest.approx(math.sqrt(2 / 303), rel=0.1)
    assert bool((weights["blocks.0.norm.weight"] == 1).all())
    assert all(not weights[name].any() for name in weights if name.endswith("bias"))
    again = dict(
        filled(
            model_of(features=400, hidden=[300], activation=activation, norm="layernorm"), 3
        ).module.named_parameters()
    )
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_what_an_engine_is_told() -> None:
    with torch.device("meta"):
        model = model_of(norm="layernorm")
    names = {name for name, _ in model.module.named_parameters()}
    held = {id(p) for unit in model.units for module in unit for p in module.parameters()}
    assert held == {id(p) for p in model.module.parameters()}
    assert all(p.is_meta for p in model.module.parameters())
    assert list(model.blocks) == list(model.module.blocks)
    assert model.plan is None
    matrices = {n for n, p in model.module.named_parameters() if model.matrices(n, p.ndim)}
    assert matrices == {n for n in names if n.endswith(("linear.weight", "head.weight"))}
    assert {n for n in matrices if model.muon(n, 2)} == matrices - {"head.weight"}
    unknown = model_of(features=None, outputs=None)
    assert {name for name, _ in unknown.module.named_parameters()} == {n for n in names if ".norm." not in n}


FREEZES = {"all": ("",), "head": ("head",), "last block": ("blocks.1",), "first block": ("blocks.0",), "none": ("x",)}


@pytest.mark.parametrize("freeze", FREEZES)
@pytest.mark.parametrize("norm", ["none", "layernorm"])
def test_flops_are_what_torch_counts(freeze: str, norm: str) -> None:
    """Exact except for biases and norms, which are in no matrix product."""
    with torch.device("meta"):
        model = model_of(features=300, hidden=[200, 100], outputs=50, norm=norm)
        features = torch.zeros(7, 300)
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(name.startswith(FREEZES[freeze]))
    with FlopCounterMode(display=False) as counter:
        total = model.module(features).sum()
        if freeze != "none":
            total.backward()
    vectors = sum(p.numel() for p in model.module.parameters() if p.ndim == 1)
    seen, claimed = counter.get_total_flops(), model.flops({"features": features})
    assert seen <= claimed <= seen + 7 * 6 * vectors
