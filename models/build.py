"""The registry that builds models by the name of their section."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from configs.errors import UserError
from configs.own import make_own
from configs.schema.model import DecoderSection, ModelSection
from configs.schema.own import OwnModel
from models import mlp
from models.base import Model
from models.decoder import Decoder
from models.flops import flops_per_token
from models.tensor import PLANS


def _decoder(section: DecoderSection) -> Model:
    decoder = Decoder(section)

    def flops(tensors: Mapping[str, Tensor]) -> float:
        rows, seq_len = tensors["tokens"].shape
        return rows * seq_len * flops_per_token(decoder, seq_len)

    return Model(
        module=decoder,
        blocks=list(decoder.blocks),
        units=decoder.shard_units(),
        initialise=decoder.init_parameter,
        flops=flops,
        matrices=lambda name, dims: dims >= 2,
        muon=lambda name, dims: dims == 2 and name.startswith("blocks."),
        random=section.dropout > 0,
        plan=PLANS["decoder"],
    )


REGISTRY: dict[str, Callable[[Any], Model]] = {"decoder": _decoder, "mlp": mlp.build}  # each takes its own section


def build_model(section: ModelSection) -> Model:
    """The model of a config, on the current default device (under `torch.device("meta")` nothing is allocated).

    Its weights hold no values yet: fill each by `initialise`, or load them.
    """
    if not isinstance(section, OwnModel):
        return REGISTRY[section.name](section)
    made = make_own("model", section.name, section.options)
    if not isinstance(made, Model):
        raise UserError(f"model.name {section.name} gave a {type(made).__name__}: it must return a models.base.Model")
    return made
