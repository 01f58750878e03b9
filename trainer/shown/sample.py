"""What the model writes now: a look at the end of a run, without a cache of keys and values, so for small models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from configs.config import Config
from trainer.data.tokenizer import load_tokenizer
from trainer.engines.base import Engine
from trainer.ranks.seeds import generator

TEMPERATURE = 0.7


def write_sample(config: Config, engine: Engine, step: int) -> str:
    """`task.sample_prompt` continued by `task.sample_tokens` tokens. A collective: each token is one forward of all
    ranks, so the number of tokens is fixed and no rank ends early."""
    tokenizer = load_tokenizer(config.data, config.decoder.vocab_size)
    ids = [int(i) for i in tokenizer.encode([config.lm.sample_prompt.encode()])[0]] or [tokenizer.end_token]
    draw = generator(torch.device("cpu"), config.run.seed, "sample", step)
    for _ in range(config.lm.sample_tokens):
        window = torch.tensor([ids[-config.seq_len :]], device=engine.device)
        logits = engine.call(partial(_last, window)).cpu()
        logits[tokenizer.size :] = -torch.inf  # rows of the embedding beyond the tokenizer
        probabilities = torch.softmax(logits / TEMPERATURE, dim=-1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=draw)))
    return tokenizer.decode(ids)


def _last(window: torch.Tensor, model: Callable[..., Any]) -> torch.Tensor:
    logits: torch.Tensor = model(window)[0, -1].float()
    return logits
