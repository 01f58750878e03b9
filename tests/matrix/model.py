"""The model of the matrix: the decoder with persistent buffers that its forward uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from configs.schema.model import DecoderSection
from models import Decoder, Model
from models.build import REGISTRY
from models.flops import flops_per_token

_PLAIN = REGISTRY["decoder"]


class Gain(nn.Module):
    """Scales the embeddings by two buffers. One of them is an integer without dimensions."""

    gain: Tensor
    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("gain", torch.empty(width))
        self.register_buffer("count", torch.empty((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gain * (1.0 + self.count / 10)).to(x.dtype)

    @torch.no_grad()
    def change(self) -> None:
        """Change the buffers as a training step does that keeps statistics in them: the same on every rank."""
        self.gain.mul_(1.01).add_(0.003)
        self.count.add_(1)


class Buffered(Decoder):
    """It has the decoder's parameters, so the decoder's tensor plan fits it."""

    def __init__(self, section: DecoderSection) -> None:
        super().__init__(section)
        assert section.dropout == 0
        self.drop: nn.Module = Gain(section.dim)

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if name == "drop.count":
            tensor.zero_()
        elif name == "drop.gain":
            tensor.normal_(1.0, 0.1, generator=generator)
        else:
            super().init_parameter(name, tensor, generator)


def as_model(decoder: Decoder) -> Model:
    """The object that engines take, for a decoder or a subclass."""

    def flops(tensors: Mapping[str, Tensor]) -> float:
        rows, seq_len = tensors["tokens"].shape
        return rows * seq_len * flops_per_token(decoder, seq_len)

    with torch.device("meta"):
        plain = _PLAIN(decoder.section)
    return replace(
        plain,
        module=decoder,
        blocks=list(decoder.blocks),
        units=decoder.shard_units(),
        initialise=decoder.init_parameter,
        flops=flops,
    )


def register() -> None:
    """From now on the registry's decoder is this one, in this process."""
    REGISTRY["decoder"] = lambda section: as_model(Buffered(section))
