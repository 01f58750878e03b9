"""Small corpora and configs for the tests of trainer/data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from configs.config import Config
from trainer.data.open_tokens import open_tokens
from trainer.data.prepare import prepare
from trainer.data.prepared import Prepared

WORDS = ["the", "model", "learns", "from", "text,", "code", "Grüße,", "世界", "🌍", "def", "f(x):\n  ", "return", "x"]


def text(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words)) + "\n"


def text_folder(path: Path, documents: int = 40, words: int = 60, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for i in range(documents):
        file = path / f"part{i % 3}" / f"{i:03}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{i} " + text(rng, int(rng.integers(1, words))))
    return path


def jsonl(path: Path, documents: int = 40, words: int = 60, seed: int = 1) -> Path:
    rng = np.random.default_rng(seed)
    lines = [json.dumps({"text": f"{i} " + text(rng, int(rng.integers(1, words)))}) for i in range(documents)]
    path.write_text("\n".join(lines) + "\n")
    return path


def config(*sources: dict[str, Any], **keys: Any) -> Config:
    """A config where everything is tiny. Keys are dotted with `__`: data__seq_len=16."""
    raw: dict[str, Any] = {
        "model": {"vocab_size": 300, "dim": 8, "layers": 1, "heads": 1, "mlp_dim": 8, "max_seq_len": 4096},
        "data": {"seq_len": 16, "validation_fraction": 0.2, "sources": list(sources)},
        "train": {"steps": 50, "global_batch": 8, "micro_batch": 2, "validate_samples": 20},
    }
    for key, value in keys.items():
        section, name = key.split("__")
        raw.setdefault(section, {})[name] = value
    return Config.model_validate(raw)


def prepared(cache: Path, cfg: Config) -> Prepared:
    return open_tokens(prepare(cfg, cache, lambda line: None, lambda: False), cfg, patience_s=0.0)


def bpe(path: Path, end_token: str = "<|endoftext|>") -> Path:
    """A small byte-level BPE like GPT-2's. It asks for truncation and padding, as published files sometimes do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=[end_token], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))
    return path
