"""Prepared data, memory-mapped: what every rank opens, and how a sample is cut from it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from configs.config import Config
from configs.errors import UserError
from models import IGNORE
from trainer.data import files
from trainer.data.order import BLOCK_DRAWS, Order, quotas

T = TypeVar("T")

_ALL_THE_SAME = "run.accept_changes=[data.content] goes on all the same"


class Split:
    """The tokens of one side of a source. Sample i begins at token i * seq_len; its targets are one token later."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        self.tokens = tokens
        self.starts = starts  # (documents,) int64: where each document begins

    def sample_count(self, seq_len: int) -> int:
        return max(len(self.tokens) - 1, 0) // seq_len

    def write_sample(self, index: int, tokens: np.ndarray, targets: np.ndarray, documents: np.ndarray | None) -> None:
        """Fill one row of a batch: each (seq_len,).

        documents counts from 0 at the sample's first token. A target that is another document's first token is
        IGNORE; where documents begin is known from their starts, never guessed from token values.
        """
        seq_len = len(tokens)
        begin = index * seq_len
        window = self.tokens[begin : begin + seq_len + 1]
        tokens[:] = window[:-1]
        targets[:] = window[1:]
        # Documents that begin inside (begin, begin + seq_len]; the last of these places is only a target.
        first, last = np.searchsorted(self.starts, (begin, begin + seq_len), side="right")
        begins = self.starts[first:last] - begin
        targets[begins - 1] = IGNORE
        if documents is not None:
            documents[:] = 0
            documents[begins[begins < seq_len]] = 1
            np.cumsum(documents, out=documents)


@dataclass
class PreparedSource:
    name: str
    weight: float
    fingerprint: str
    folder: Path
    train: Split
    validation: Split
    meta: dict[str, Any]


class Prepared:
    """All sources of a config, in its order. Opening maps the files; nothing is read before it is needed."""

    def __init__(self, sources: list[PreparedSource], tokenizer: dict[str, Any]) -> None:
        self.sources = sources
        self.tokenizer_size: int = tokenizer["size"]
        self.end_token: int = tokenizer["end_token"]
        names, weights = [s.name for s in sources], [s.weight for s in sources]
        self.effective_weights = {
            name: quota / BLOCK_DRAWS for name, quota in zip(names, quotas(weights, names), strict=True)
        }

    @staticmethod
    def open(path: Path, patience_s: float = 30.0) -> Prepared:
        """Open what `prepare` returned. A file another node has just written may need a while to be seen here."""
        index = _patiently(lambda: files.read_json(path), patience_s)
        sources = [
            _patiently(functools.partial(_open_source, path.parent / entry["folder"], entry), patience_s)
            for entry in index["sources"]
        ]
        return Prepared(sources, index["tokenizer"])

    @property
    def fingerprints(self) -> dict[str, str]:
        """What each source holds; two runs with equal ones see the same tokens."""
        return {s.name: s.fingerprint for s in self.sources}

    def order(self, config: Config) -> Order:
        """The global order of the training samples."""
        sizes = [s.train.sample_count(config.data.seq_len) for s in self.sources]
        return Order(sizes, [s.weight for s in self.sources], config.run.seed, [s.name for s in self.sources])

    def describe(self, config: Config) -> list[str]:
        """A line per source for the start-up summary."""
        seq_len, lines = config.data.seq_len, []
        draws = config.train.steps * config.train.global_batch
        width = max(len(s.name) for s in self.sources)
        for s in self.sources:
            samples, share = s.train.sample_count(seq_len), self.effective_weights[s.name]
            line = (
                f"{s.name:<{width}}  {len(s.train.starts):,} documents, {len(s.train.tokens):,} tokens, "
                f"{samples:,} samples; weight {share:.4f}, {draws * share / max(samples, 1):.2f} epochs; "
                f"held out {len(s.validation.starts):,} documents, {s.validation.sample_count(seq_len):,} samples"
            )
            for count, what in (("empty_documents", "empty, left out"), ("replaced_documents", "not UTF-8")):
                if s.meta[count]:
                    line += f"; {s.meta[count]:,} {what}"
            lines.append(line)
        return lines


def check_unchanged(expected: dict[str, str], prepared: Prepared) -> None:
    """Refuse, by name, sources that differ from those a run began with.

    expected: `Prepared.fingerprints` of then. UserError says what changed, where the old folder still tells.
    """
    now = {s.name: s for s in prepared.sources}
    for name in expected.keys() | now.keys():
        if name not in now or name not in expected:
            what = "is gone" if name not in now else "is new"
            raise UserError(
                f"data source {name!r} {what}: this run began with {', '.join(sorted(expected))}\n"
                f"restore data.sources, or begin a new run; {_ALL_THE_SAME}"
            )
    for name, source in now.items():
        if expected[name] != source.fingerprint:
            raise UserError(
                f"data source {name!r} changed since this run began: {_what_changed(source, expected[name])}\n"
                "restore it, or begin a new run (start.from with start.take=weights goes on from its weights); "
                f"{_ALL_THE_SAME}"
            )


def _what_changed(source: PreparedSource, expected: str) -> str:
    unknown = f"its fingerprint was {expected[:12]}, is {source.fingerprint[:12]}"
    for folder in source.folder.parent.glob(f"{source.name}-*-{expected[:16]}"):
        try:
            meta, old = files.read_json(folder / "meta.json"), files.read_json(folder / "files.json")
            new = files.read_json(source.folder / "files.json")
        except (OSError, ValueError):
            continue
        parts = [
            f"{key} was {meta.get(key)}, is {source.meta.get(key)}"
            for key in ("tokenizer", "end_token", "validation_fraction", "test_fraction", "dtype")
            if meta.get(key) != source.meta.get(key)
        ]
        groups = {
            "changed": [n for n in old.keys() & new.keys() if old[n][2] != new[n][2]],
            "removed": old.keys() - new.keys(),
            "added": new.keys() - old.keys(),
        }
        for what, names in groups.items():
            if names:
                shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
                parts.append(f"{len(names)} {'file' if len(names) == 1 else 'files'} {what} ({shown})")
        if not parts and meta.get("cuts") != source.meta.get("cuts"):
            parts = ["its long texts were cut where that can change ids, and are not any more"]
        return "; ".join(parts) or unknown
    return unknown


def _open_source(folder: Path, entry: dict[str, Any]) -> PreparedSource:
    meta = files.read_json(folder / "meta.json")
    splits = {}
    for split, counts in meta["splits"].items():
        tokens = files.map_array(folder / f"{split}.npy")
        starts = files.map_array(folder / f"{split}.documents.npy")
        if len(tokens) != counts["tokens"] or len(starts) != counts["documents"]:
            raise ValueError(f"{folder} does not hold what its meta.json says")
        splits[split] = Split(tokens, starts)
    return PreparedSource(
        entry["name"], entry["weight"], meta["fingerprint"], folder, splits["train"], splits["validation"], meta
    )


def _patiently(read: Callable[[], T], patience_s: float) -> T:
    """Shared filesystems cache: what another node has just written may be missing, or short, for a while."""
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            return read()
        except (OSError, ValueError) as e:
            if time.monotonic() >= deadline_s:
                raise UserError(f"prepared data is missing or damaged: {e}\nremove its folder and start again") from e
            time.sleep(0.2)
