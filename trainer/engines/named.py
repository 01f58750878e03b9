"""The part of an engine that does not depend on where numbers lie: names and forms of tensors, and a model's modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from configs.config import Config
from configs.errors import UserError
from configs.schema.model import ModelSection
from models import Model, build_model
from trainer.checkpoint.load.plan import TensorInfo
from trainer.data.batch import Batch
from trainer.engines.optim import counts_steps, state_keys
from trainer.tasks.base import Task

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


def _mark(dtype: torch.dtype) -> float:
    """A value that no table of numbers holds."""
    return torch.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min


class Named:
    """Every engine's base. What it says of names holds for each model that is built anew in the same form."""

    config: Config
    task: Task

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
        # A mask of bool may hold any value, so it is not looked at.
        every = self.model.named_buffers()
        rest = [name for name, b in every if name not in self._buffer_infos and b.dtype != torch.bool]
        for name in rest:
            buffer = self.model.get_buffer(name)
            buffer.fill_(_mark(buffer.dtype))
        self.built.rebuild_buffers(self.model)
        for name in rest:
            buffer = self.model.get_buffer(name)
            mark = torch.full_like(buffer, _mark(buffer.dtype))
            if torch.isclose(buffer, mark, equal_nan=True).any():
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

    def _sums(self, model: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The task's. Raises UserError where it gives another form of numbers than it says."""
        total, sums = self.task.sums(model, batch)
        columns = self.task.columns
        if sums.shape != (len(columns),) or sums.dtype != torch.float64 or total.ndim:
            raise UserError(
                f"task.name {self.config.task.name}: `sums` gave a total of shape {list(total.shape)} and columns of "
                f"shape {list(sums.shape)} in {sums.dtype}\nit must give a 0-d total and {len(columns)} columns in "
                f"torch.float64: {', '.join(columns[:8])}"
            )
        return total, sums

    @staticmethod
    def _weighted(total: torch.Tensor, scale: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """What to differentiate of a micro batch. A loss (the first column) that is not finite makes NaN of its
        gradients, even of finite ones. The reduction of the gradients takes NaN to all ranks, and all skip the
        update."""
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
