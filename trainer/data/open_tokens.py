"""Open prepared tokens: the folders of `prepare`, cut into windows of the config's length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.config import Config
from trainer.data import files
from trainer.data.prepared import Prepared, PreparedSource
from trainer.data.windows import Split, Windows


def open_tokens(path: Path, config: Config, patience_s: float = 30.0) -> Prepared:
    """See `Prepared.open`."""

    def splits(folder: Path, meta: dict[str, Any]) -> Mapping[str, Windows]:
        return {name: _windows(folder, name, counts, config) for name, counts in meta["splits"].items()}

    return Prepared.open(path, splits, patience_s)


def _windows(folder: Path, split: str, counts: dict[str, int], config: Config) -> Windows:
    tokens = files.map_array(folder / f"{split}.npy")
    starts = files.map_array(folder / f"{split}.documents.npy")
    if len(tokens) != counts["tokens"] or len(starts) != counts["documents"]:
        raise ValueError(f"{folder} does not hold what its meta.json says")
    return Windows(Split(tokens, starts), config.seq_len, config.data.document_mask)


def tokens_of(source: PreparedSource, split: str) -> Split:
    """The tokens of a split, from which its samples are cut."""
    windows = source.splits[split]
    assert isinstance(windows, Windows)
    return windows.split


def describe_tokens(prepared: Prepared, draws: int) -> list[str]:
    """A line per source for the start-up summary."""
    lines, width = [], max(len(s.name) for s in prepared.sources)
    for s, share in zip(prepared.sources, prepared.shares(draws), strict=True):
        train, held_out = tokens_of(s, "train"), tokens_of(s, "validation")
        line = (
            f"{s.name:<{width}}  {len(train.starts):,} documents, {len(train.tokens):,} tokens, {share}; "
            f"held out {len(held_out.starts):,} documents, {len(s.validation):,} samples"
        )
        for count, what in (("empty_documents", "empty, left out"), ("replaced_documents", "not UTF-8")):
            if s.meta[count]:
                line += f"; {s.meta[count]:,} {what}"
        lines.append(line)
    return lines
