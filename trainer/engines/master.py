"""fp32 master weights for one process that computes in bf16: what FSDP2's mixed precision does when there is a mesh."""

from __future__ import annotations

import torch
from torch import nn


class MasterWeights:
    """The model computes with low-precision copies; `stored` holds what the optimizer updates and checkpoints keep.

    Gradients arrive in the compute dtype and are added up in the stored dtype, micro batch by micro batch, as FSDP2
    does. So the numbers are the same with one process as with many. What is in the compute dtype already has no copy.
    """

    def __init__(self, model: nn.Module, compute: torch.dtype) -> None:
        self.stored: dict[str, nn.Parameter] = {}
        self.computed: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if parameter.dtype == compute:
                self.stored[name] = parameter
                continue
            self.stored[name] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            self.computed[name] = parameter  # the same object, ties included, gets new memory
            parameter.data = parameter.detach().to(compute)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._collector(self.stored[name]))

    @staticmethod
    def _collector(master: nn.Parameter):  # type: ignore[no-untyped-def]
        def collect(computed: torch.Tensor) -> None:
            grad, computed.grad = computed.grad, None
            if grad is None:
                return
            if master.grad is None:
                master.grad = grad.to(master.dtype)
            else:
                master.grad += grad

        return collect

    @torch.no_grad()
    def copy_to_compute(self, trained_only: bool) -> None:
        """After every change of `stored`; an update changes only what trains."""
        names = [name for name in self.computed if self.stored[name].requires_grad or not trained_only]
        if names:
            torch._foreach_copy_([self.computed[n] for n in names], [self.stored[n] for n in names])
