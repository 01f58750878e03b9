"""A sample of the model's text at the end of a run. It has no cache of keys and values, so it is for small models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from configs.config import Config
from trainer.data.tokenizer import load_tokenizer
from trainer.ranks.seeds import generator
from trainer.tasks.base import Call

TEMPERATURE = 0.7


def write_sample(call: Call, config: Config, device: torch.device, step: int) -> str:
    """`task.sample_prompt` continued by `task.sample_tokens` tokens. A collective: each token is one forward of all
    ranks, so every rank makes the same number of tokens."""
    section = config.lm
    tokenizer = load_tokenizer(config.data, config.most_words)
    ids = [int(i) for i in tokenizer.encode([section.sample_prompt.encode()])[0]] or [tokenizer.end_token]
    draw = generator(torch.device("cpu"), config.run.seed, "sample", step)
    for _ in range(section.sample_tokens):
        window = torch.tensor([ids[-config.seq_len :]], device=device)
        logits = call(partial(_last, window)).cpu()
        logits[tokenizer.size :] = -torch.inf  # rows of the embedding beyond the tokenizer
        probabilities = torch.softmax(logits / TEMPERATURE, dim=-1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=draw)))
    return tokenizer.decode(ids)


def _last(window: torch.Tensor, model: Callable[..., Any]) -> torch.Tensor:
    logits: torch.Tensor = model(window)[0, -1].float()
    return logits
