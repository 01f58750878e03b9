"""A multilayer perceptron: features in, one number per output out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema.model import MlpSection
from models.base import Model
from models.flops import stages

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its weight: features always arrive in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Block(nn.Module):
    """One hidden layer: linear, norm where asked for, activation, dropout."""

    def __init__(self, section: MlpSection, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs, eps=section.norm_eps) if section.norm == "layernorm" else None
        self.activation = ACTIVATIONS[section.activation]
        self.drop = nn.Dropout(section.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.drop(self.activation(x if self.norm is None else self.norm(x)))


class MLP(nn.Module):
    """A multilayer perceptron. A size that the data decide counts as 1 until the task sets it in the section. So the
    names of the parameters never depend on that size."""

    def __init__(self, section: MlpSection) -> None:
        super().__init__()
        self.section = section
        widths = [section.features or 1, *section.hidden]
        self.blocks = nn.ModuleList(Block(section, *pair) for pair in pairwise(widths))
        self.head = Linear(widths[-1], section.outputs or 1)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, features) -> (B, outputs), in the weights' dtype."""
        x = features
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill the whole, unsharded parameter of that name in place, with numbers from the generator alone.

        Biases are 0, norms 1. Weights before ReLU and GELU, which pass half of their inputs, have variance 2 / inputs
        (He). Weights before tanh and in the head have variance 2 / (inputs + outputs) (Glorot).
        """
        *_, module, kind = name.split(".")
        if kind == "bias":
            tensor.zero_()
        elif module == "norm":
            tensor.fill_(1.0)
        else:
            outputs, inputs = tensor.shape
            halved = module != "head" and self.section.activation != "tanh"
            tensor.normal_(0.0, math.sqrt(2.0 / (inputs if halved else inputs + outputs)), generator=generator)

    def flops(self, tensors: Mapping[str, Tensor]) -> float:
        """FLOPs of forward and backward of a batch, for what trains now, counted as `models/flops.py` says."""
        layers: list[list[nn.Module]] = []
        for block in self.blocks:
            assert isinstance(block, Block)
            layers += [[block.linear]] if block.norm is None else [[block.linear], [block.norm]]
        return len(tensors["features"]) * stages([*layers, [self.head]], needs=False)[0]


def build(section: MlpSection) -> Model:
    mlp = MLP(section)
    blocks = list(mlp.blocks)
    return Model(
        module=mlp,
        blocks=blocks,
        units=[*([block] for block in blocks), [mlp.head]],
        initialise=mlp.init_parameter,
        flops=mlp.flops,
        matrices=lambda name, dims: dims == 2,
        muon=lambda name, dims: dims == 2 and name.startswith("blocks."),
    )
