"""Optimizers and their parameter groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.sgd import sgd

from configs.schema.optim import OptimSection
from models import Model
from trainer.engines.boxes import box_of, local_part


class SGD(torch.optim.SGD):
    """torch's fused one, on this rank's parts: it does not take sharded tensors itself."""

    found_inf: torch.Tensor | None = None  # fp32 0-d: not 0 where the update is to be skipped

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            sgd(
                [local_part(p.detach()) for p in params],
                [local_part(p.grad) for p in params],
                [local_part(self._momentum(p)) if group["momentum"] else None for p in params],
                fused=True,
                found_inf=self.found_inf,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )

    def _momentum(self, p: torch.Tensor) -> torch.Tensor:
        """Begins as zeros. torch would take memory as it finds it, and that would stay if the first update is
        skipped."""
        state = self.state[p]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p)
        momentum: torch.Tensor = state["momentum_buffer"]
        return momentum


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by a Newton-Schulz iteration (Keller Jordan, 2024), for matrices sharded or not.

    `torch.optim.Muon` iterates on the sharded matrix itself, with a collective per product. Here the momentum stays
    sharded and each rank gathers one matrix at a time: one all-gather per matrix, and the same bits on every layout.
    """

    found_inf: torch.Tensor | None = None

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    ITERATIONS = 5

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                old = self.state[p]["momentum_buffer"]
                buffer = old.lerp(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(buffer, group["momentum"])  # Nesterov
                update = _keep_layout(_orthogonal, direction)
                # Jordan's scaling: an update of the same size per element, whatever the matrix's shape
                size = math.sqrt(max(1.0, p.shape[0] / p.shape[1]))
                decayed = p * (1 - group["lr"] * group["weight_decay"])
                self._take(old, buffer)
                self._take(p, decayed.add_(update, alpha=-group["lr"] * size))

    def _take(self, kept: torch.Tensor, new: torch.Tensor) -> None:
        """Write `new` over `kept`, unless the update is to be skipped."""
        mine, new = local_part(kept), local_part(new)
        mine.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, mine, new))


def _keep_layout(function: Any, tensor: torch.Tensor) -> torch.Tensor:
    """`function` of the whole tensor, cut back to this rank's part. Holds a collective when `tensor` is sharded."""
    if not isinstance(tensor, DTensor):
        return function(tensor)
    whole = function(tensor.full_tensor())
    # every rank computed the whole from the same gathered bytes: nothing needs to be sent to cut it
    offsets, sizes = box_of(tensor)
    local = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].contiguous()
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrix, roughly: singular values end between about 0.7 and 1.2."""
    a, b, c = Muon.COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(Muon.ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def build_optimizers(
    optim: OptimSection, model: Model, trained: Mapping[str, torch.Tensor]
) -> list[torch.optim.Optimizer]:
    """One optimizer (two under muon) over `trained`, decay on matrices only. Each group keeps its peak as `peak_lr`."""
    muon = {n for n, p in trained.items() if _is_muons(optim, model, n, p.ndim)}
    rest = [n for n in trained if n not in muon]
    matrices = {n for n in rest if model.matrices(n, trained[n].ndim)}
    groups = [
        {"params": [trained[n] for n in rest if n in matrices], "weight_decay": optim.weight_decay},
        {"params": [trained[n] for n in rest if n not in matrices], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups and optim.name == "sgd":
        optimizers.append(SGD(groups, lr=optim.lr, momentum=optim.momentum))
    elif groups:
        kind = torch.optim.Adam if optim.name == "adam" else torch.optim.AdamW
        betas = (optim.betas[0], optim.betas[1])
        optimizers.append(kind(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True))
    if muon:
        optimizers.append(Muon([trained[n] for n in sorted(muon)], optim.muon_lr, optim.momentum, optim.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


@torch.no_grad()
def step_unless(skip: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """An update that changes nothing where `skip`, bool 0-d, holds. It lies on the device, and the host does not ask.

    torch's fused optimizers read `found_inf`, which its gradient scaler sets for the same purpose; ours do likewise.
    """
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()


@torch.no_grad()
def add_penalties(optim: OptimSection, model: Model, trained: Mapping[str, torch.Tensor]) -> None:
    """Add the gradient of `optim.l1` * |w| + `optim.l2` / 2 * w^2 to that of each matrix, right before an update.

    After clipping: the penalty does not depend on how large the loss' gradient is. Each rank adds to what it holds.
    """
    if not (optim.l1 or optim.l2):
        return
    for name, parameter in trained.items():
        if parameter.grad is None or not model.matrices(name, parameter.ndim):
            continue
        weight, grad = local_part(parameter.detach()), local_part(parameter.grad)
        grad.add_(weight.sign(), alpha=optim.l1).add_(weight, alpha=optim.l2)


def _is_muons(optim: OptimSection, model: Model, name: str, dims: int) -> bool:
    return optim.name == "muon" and model.muon(name, dims)


def state_keys(optim: OptimSection, model: Model, name: str, dims: int) -> tuple[str, ...]:
    """Names of the tensors that the optimizer keeps for a parameter of this name, each of the parameter's shape."""
    if _is_muons(optim, model, name, dims):
        return ("momentum_buffer",)
    if optim.name == "sgd":
        return ("momentum_buffer",) if optim.momentum else ()
    return ("exp_avg", "exp_avg_sq")


def counts_steps(optim: OptimSection, model: Model, name: str, dims: int) -> bool:
    """Whether the optimizer keeps a step count for this parameter (bias correction)."""
    return optim.name != "sgd" and not _is_muons(optim, model, name, dims)
