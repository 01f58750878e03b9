"""Whether prepared data is enough for a config, and which settings would help: only advice that works in this case."""

from __future__ import annotations

import numpy as np

from configs.config import Config
from configs.errors import UserError
from trainer.data.open_tokens import tokens_of
from trainer.data.prepared import Prepared, PreparedSource

_HELD_OUT_DOCUMENTS = 20  # the expected number; a hash chooses them, so a smaller number may give none
_HELD_OUT_SAMPLES = 4  # of documents of medium length


def check_enough(prepared: Prepared, config: Config) -> None:
    """Raise UserError when a source has no training sample, or when validation is wanted and has no sample."""
    seq_len = config.seq_len
    for s in prepared.sources:
        train = tokens_of(s, "train")
        if train.sample_count(seq_len) == 0:
            raise UserError(
                f"data source {s.name!r} is shorter than one sample: {len(train.tokens):,} training tokens in "
                f"{len(train.starts):,} documents, a sample of data.seq_len {seq_len} needs {seq_len + 1:,}\n"
                f"{_ways(_for_training(s, config))}"
            )
    if config.train.validate_every_steps and not _held_out(prepared, seq_len):
        documents = sum(_documents(s) for s in prepared.sources)
        tokens = sum(len(tokens_of(s, "validation").tokens) for s in prepared.sources)
        why = " (a document is not split, and there is one)" if documents == 1 else ""
        raise UserError(
            f"train.validate_every_steps is {config.train.validate_every_steps}, but the validation split has "
            f"{tokens:,} tokens, less than one sample of data.seq_len {seq_len}{why}\n"
            f"{_ways([*_for_validation(prepared, config), *_without_validation(config)])}"
        )


def _ways(ways: list[str]) -> str:
    return "add documents" + "".join(f", or set {way}" for way in ways)


def _documents(source: PreparedSource) -> int:
    return len(tokens_of(source, "train").starts) + len(tokens_of(source, "validation").starts)


def _held_out(prepared: Prepared, seq_len: int) -> int:
    return sum(tokens_of(s, "validation").sample_count(seq_len) for s in prepared.sources)


def _without_validation(config: Config) -> list[str]:
    early = " train.early_stop_patience=0" if config.train.early_stop_patience else ""
    return [f"train.validate_every_steps=0{early}"] if config.train.validate_every_steps else []


def _for_training(source: PreparedSource, config: Config) -> list[str]:
    """Settings that give this source a training sample."""
    ways, tokens = [], len(tokens_of(source, "train").tokens)
    rest = " ".join(["", *_without_validation(config)])
    if tokens + len(tokens_of(source, "validation").tokens) > config.seq_len:
        ways.append(f"data.validation_fraction=0{rest}")
    if tokens > 2:
        enough = tokens_of(source, "validation").sample_count(tokens - 1) > 0
        ways.append(f"data.seq_len={tokens - 1}{'' if enough else rest}")
    return ways


def _for_validation(prepared: Prepared, config: Config) -> list[str]:
    """Settings that give a validation sample, while each source keeps training samples."""
    ways = []
    tokens = max(len(tokens_of(s, "validation").tokens) for s in prepared.sources)
    if tokens > 2:
        ways.append(f"data.seq_len={tokens - 1}")
    shares = []
    for s in prepared.sources:
        splits = [tokens_of(s, name) for name in ("train", "validation")]
        lengths = [np.diff([*split.starts, len(split.tokens)]) for split in splits]
        needed = _HELD_OUT_SAMPLES * (config.seq_len + 1) / float(np.median(np.concatenate(lengths)))
        shares.append(max(needed, _HELD_OUT_DOCUMENTS) / _documents(s))
    if min(shares) <= 0.5:
        ways.append(f"data.validation_fraction={min(shares):.2g}")
    return ways
