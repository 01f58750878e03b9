"""A small section and a model with weights, for the tests of this folder."""

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from configs.schema.model import DecoderSection
from models import Decoder, Model, build_model

SMALL: dict[str, Any] = {
    "vocab_size": 97, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_dim": 48, "max_seq_len": 64
}  # fmt: skip


def section_of(**overrides: Any) -> DecoderSection:
    return DecoderSection(**{**SMALL, **overrides})


def initialise(built: Model, seed: int = 0) -> Decoder:
    """Weights as an engine fills them: one generator per parameter, from seed and name."""
    for name, parameter in built.module.named_parameters():
        built.initialise(name, parameter, torch.Generator().manual_seed(seed + zlib.crc32(name.encode())))
    assert isinstance(built.module, Decoder)
    return built.module


@pytest.fixture(name="section")
def _section() -> Callable[..., DecoderSection]:
    return section_of


@pytest.fixture
def build() -> Callable[..., Decoder]:
    """build(**overrides) -> a small decoder. Its weights are ten times the usual, so that errors show."""
    return lambda **overrides: initialise(build_model(section_of(**{"init_std": 0.2, **overrides})))
