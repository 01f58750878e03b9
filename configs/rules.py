"""The rules between sections of a config, which no section can check alone. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from configs.deepspeed import contradictions
from configs.own import is_own
from configs.schema.model import DecoderSection
from configs.schema.sections import Sections
from configs.schema.task import LmSection


def mistakes(config: Sections) -> list[str]:
    """What is impossible in this config, in plain words with the keys. Checked before any rank is started."""
    unfit = list(_task(config))
    if unfit:
        return unfit  # the rules below need the sizes that task and model lack here
    zero = contradictions(config) if config.parallel.engine == "zero" else []
    return [*_data(config), *_tensor(config), *zero]


def _task(config: Sections) -> Iterator[str]:
    """A model computes with tokens or with features. The task must provide what the model takes."""
    task, model = config.task.name, config.model.name
    fitting = "decoder" if task == "lm" else "mlp"
    if model != fitting and not is_own(task) and not is_own(model):
        yield f"task.name {task} needs model.name {fitting}, not {model}"
    if task == "lm" and is_own(model) and config.vocab_size is None:
        yield "task.name lm needs model.options.vocab_size: rows of the embedding"
    if task == "lm" and not is_own(model) and config.vocab_size is None and config.data.tokenizer == "none":
        yield "model.vocab_size is missing: with data.tokenizer=none nothing else tells how many words there are"
    if config.task.needs_tokenizer and config.data.seq_len is None:
        yield "data.seq_len is missing: tokens per sample"


def _data(config: Sections) -> Iterator[str]:
    model, task = config.model, config.task
    if not config.task.needs_tokenizer and config.data.seq_len is not None:
        yield f"data.seq_len is for tokens: task {task.name} has none"
    if isinstance(model, DecoderSection) and config.data.seq_len is not None and config.seq_len > model.max_seq_len:
        yield f"data.seq_len {config.seq_len} is longer than model.max_seq_len {model.max_seq_len}"
    names = Counter(source.name for source in config.data.sources)
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        yield f"data.sources: the name {twice!r} stands twice"
    for source in config.data.sources:
        if source.has_records == (task.name == "lm"):
            kinds = "text, jsonl or tokens" if task.name == "lm" else "csv, parquet or idx"
            yield f"data.sources: {source.name!r} has kind {source.kind}; task {task.name} reads {kinds}"
    if isinstance(task, LmSection) and task.sample_tokens and config.data.tokenizer == "none":
        yield "task.sample_tokens needs a data.tokenizer, which is none"


def _tensor(config: Sections) -> Iterator[str]:
    """What a tensor group cannot split among its ranks."""
    model, tensor = config.model, config.parallel.tensor
    if not isinstance(model, DecoderSection):
        if tensor > 1:
            yield f"parallel.tensor {tensor} has no way to split model.name {model.name}: it must be 1"
        return
    kv_heads = model.kv_heads or model.heads
    for key, count in (("heads", model.heads), ("kv_heads", kv_heads)):
        if count % tensor:
            fitting = [n for n in range(1, min(kv_heads, 64) + 1) if model.heads % n == kv_heads % n == 0]
            yield (
                f"model.{key} {count} is not a multiple of parallel.tensor {tensor}: whole heads go to each rank; "
                f"use a parallel.tensor of {' or '.join(map(str, fitting))}"
            )
            return
    for key, size in (("vocab_size", model.vocab_size), ("mlp_dim", model.mlp_dim)):
        if size is not None and -(-size // tensor) * (tensor - 1) >= size:  # parts of equal size, the last one smaller
            yield (
                f"model.{key} {size} leaves no part for the last of parallel.tensor {tensor} ranks; "
                f"use a smaller parallel.tensor"
            )
            return
    padded = -(-config.seq_len // tensor) * tensor
    if model.position == "learned" and padded > model.max_seq_len >= config.seq_len:
        yield (
            f"data.seq_len {config.seq_len} is filled up to {padded}, a multiple of parallel.tensor {tensor}, "
            f"but model.max_seq_len gives learned positions for {model.max_seq_len}; "
            f"use data.seq_len={padded - tensor} or a parallel.tensor that divides it"
        )
