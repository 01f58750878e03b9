"""Language modelling: predict each next token."""

from __future__ import annotations

import math

import torch
from torch import nn

from configs.schema.task import LmSection
from trainer.data.loader import MicroBatch


class LanguageModelling:
    """Turns a micro batch into a differentiable total and the sums that metrics are made of.

    All are sums over targets, never means: the step divides by the global count of targets, so the loss does not depend
    on how samples fall on ranks and micro batches.
    """

    def __init__(self, section: LmSection) -> None:
        self.section = section

    def sums(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(0-d total to differentiate, fp64 [columns]) of one micro batch."""
        losses = model(
            micro_batch.tokens,
            documents=micro_batch.documents,
            targets=micro_batch.targets,
            z_loss=self.section.z_loss,
            chunk_tokens=self.section.loss_chunk_tokens,
        )
        return losses.total, losses.loss.double().reshape(1)

    @staticmethod
    def metrics(sums: torch.Tensor, target_tokens: int) -> dict[str, float]:
        """Named numbers from summed columns and the count of targets."""
        return {"loss": float(sums[0]) / target_tokens}

    @staticmethod
    def validation_metrics(sums: torch.Tensor, target_tokens: int) -> dict[str, float]:
        """As `metrics`, for held-out data. The first one decides which checkpoint is best: lower is better."""
        loss = float(sums[0]) / target_tokens
        return {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))}
