"""The part of an engine that does not depend on where numbers lie: names and forms of tensors, and a model's modes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from configs.config import Config
from configs.errors import UserError
from configs.schema.model import ModelSection
from models import Model, build_model
from trainer.checkpoint.load.plan import TensorInfo
from trainer.engines.optim import counts_steps, state_keys

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def find_aliases(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters -> first name."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if first[id(p)] != name}


def names_of(section: ModelSection) -> tuple[list[str], dict[str, str]]:
    """(names of a model's parameters, further names of tied ones), of a model that takes no memory."""
    with torch.device("meta"):
        model = build_model(section).module
    return [name for name, _ in model.named_parameters()], find_aliases(model)


class Named:
    """Every engine's base. What it says of names holds for each model that is built anew in the same form."""

    config: Config

    def __init__(self, built: Model) -> None:
        """`built`: on meta, parameters in the format in which they are stored."""
        self.built = built
        model = built.module
        self._aliases = find_aliases(model)
        self._infos = {name: TensorInfo(tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
        kept = model.state_dict().keys()
        self._buffer_infos = {
            name: TensorInfo(tuple(b.shape), b.dtype) for name, b in model.named_buffers() if name in kept
        }

    @property
    def model(self) -> nn.Module:
        return self.built.module

    def _rebuild_buffers(self) -> None:
        """Fill the buffers that no checkpoint holds. Raises UserError when the model leaves one as memory was found."""
        rest = [(n, b) for n, b in self.model.named_buffers() if n not in self._buffer_infos and b.is_floating_point()]
        for _, buffer in rest:
            buffer.fill_(torch.nan)
        self.built.rebuild_buffers(self.model)
        left = dict(self.model.named_buffers())
        for name, _ in rest:
            if left[name].isnan().any():
                raise UserError(
                    f"model.name {self.config.model.name}: no checkpoint holds the buffer {name!r}, and the model does "
                    "not fill it\nlet `rebuild_buffers` of its models.base.Model fill it, or register it as persistent"
                )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No gradients, and layers as they are for evaluating: no dropout."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()

    @staticmethod
    def _weighted(total: torch.Tensor, scale: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """What to differentiate of a micro batch. A loss (the first column) that is not finite makes NaN of its
        gradients, even of finite ones: they reach all ranks by the reduction that is made anyway, and all skip the
        update alike."""
        return total * (scale + 0.0 * sums[0].detach().to(scale.dtype))

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {name: b for name, b in self.model.named_buffers() if name in self._buffer_infos}

    def state_keys(self, name: str) -> tuple[str, ...]:
        return state_keys(self.config.optim, self.built, name, len(self._infos[name].shape))

    def counts_steps(self, name: str) -> bool:
        return counts_steps(self.config.optim, self.built, name, len(self._infos[name].shape))

    def parameters(self) -> dict[str, TensorInfo]:
        return dict(self._infos)

    def buffers(self) -> dict[str, TensorInfo]:
        return dict(self._buffer_infos)

    def aliases(self) -> dict[str, str]:
        return dict(self._aliases)
