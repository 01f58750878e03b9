"""Language modelling: predict each next token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from configs.config import Config
from configs.fingerprint import decide, undecided
from configs.schema.task import LmSection
from models import IGNORE
from trainer.data.batch import Batch, Row
from trainer.data.open_tokens import describe_tokens, open_tokens
from trainer.data.prepare import prepare
from trainer.data.prepared import Prepared
from trainer.data.samples import Columns
from trainer.data.tokenizer import load_tokenizer, words_of
from trainer.tasks.base import Better, Call
from trainer.tasks.sample import write_sample


class LanguageModelling:
    """Windows of tokens. Each token's target is the next token; sums are over targets."""

    columns: tuple[str, ...] = ("loss",)
    weights: tuple[str, ...] = ("targets",)
    better: Mapping[str, Better] = {"loss": "min", "perplexity": "min"}
    unit: Literal["tokens", "samples"] = "tokens"

    def __init__(self, section: LmSection) -> None:
        self.section = section

    prepare = staticmethod(prepare)
    open = staticmethod(open_tokens)

    def resolve(self, config: Config, prepared: Prepared) -> Config:
        if "model.vocab_size" not in undecided(config):
            return config
        return decide(config, {"model.vocab_size": words_of(config, load_tokenizer(config.data, config.most_words))})

    def describe(self, prepared: Prepared, config: Config) -> list[str]:
        return describe_tokens(prepared, config.train.steps * config.train.global_batch)

    def collate(self, samples: Sequence[Columns], real: int, rows: Sequence[Row]) -> Batch:
        """`tokens`, `targets` (rows, T) int64, and `documents` (rows, T) int32 where tokens see only their own."""
        tensors = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}
        tensors["targets"][real:] = IGNORE
        return Batch(tensors, real)

    def weigh(self, batch: Batch) -> tuple[float, ...]:
        return (float(np.count_nonzero(batch.tensors["targets"].numpy() != IGNORE)),)

    def sums(self, model: Callable[..., Any], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        losses = model(**batch.tensors, z_loss=self.section.z_loss, chunk_tokens=self.section.loss_chunk_tokens)
        return losses.total, losses.loss.double().reshape(1)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        loss = sums["loss"] / sums["targets"]
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def example(self, config: Config) -> tuple[Batch, int]:
        row = torch.zeros(1, config.seq_len, dtype=torch.int64, device="meta")
        return Batch({"tokens": row, "targets": row}, 1), config.seq_len

    def show(self, call: Call, config: Config, device: torch.device, step: int) -> str | None:
        if not self.section.sample_tokens:
            return None
        return f"what the model writes now:\n{write_sample(call, config, device, step)}"

    def fault(self, batch: Batch) -> str | None:
        """Why a batch is wrong: it has no targets, or a target belongs to another document than its input."""
        targets, documents = batch.tensors["targets"], batch.tensors.get("documents")
        if batch.rows and not (targets != IGNORE).any():
            return "a micro batch with samples has no target"
        if documents is None:
            return None
        crosses = (documents[:, 1:] != documents[:, :-1]) & (targets[:, :-1] != IGNORE)
        if not crosses.any():
            return None
        sample, place = (int(n) for n in crosses.nonzero()[0])
        return f"the target of token {place} of sample {sample} is another document's"

    def first_loss(self, config: Config) -> float:
        return math.log(config.most_words)
