"""Gradients of bf16 parameters, added up over micro batches in fp32."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from trainer.engines.boxes import local_part


class AddedUp:
    """Sums over the micro batches of a step. bf16 has 8 bits, so a gradient of 1/300 of the sum so far would change
    nothing. Of 64 micro batches, the last ones would be mostly lost.

    It takes 4 bytes for each parameter of this rank, from the first micro batch to the last.
    """

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def take(self, parameters: Iterable[torch.Tensor], last: bool) -> None:
        """After each backward: take the gradients over. After the last one put the sums in their place, rounded
        once."""
        for number, parameter in enumerate(parameters):
            if parameter.grad is None:
                continue
            grad = local_part(parameter.grad)
            if number in self._sums:
                self._sums[number] += grad
            elif not last:
                self._sums[number] = grad.float()
            else:
                continue  # the only one: it is the sum
            if last:
                grad.copy_(self._sums.pop(number))
            else:
                grad.zero_()
