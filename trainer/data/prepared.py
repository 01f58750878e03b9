"""Prepared data, memory-mapped, as every rank opens it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import UserError
from trainer.data import files
from trainer.data.order import BLOCK_DRAWS, Order, quotas
from trainer.data.samples import Samples

T = TypeVar("T")
OpenSplits = Callable[[Path, dict[str, Any]], Mapping[str, Samples]]  # of a prepared source: its folder and meta.json

_ALL_THE_SAME = "run.accept_changes=[data.content] goes on all the same"


@dataclass
class PreparedSource:
    name: str
    weight: float
    fingerprint: str
    folder: Path
    splits: Mapping[str, Samples]
    meta: dict[str, Any]

    @property
    def train(self) -> Samples:
        return self.splits["train"]

    @property
    def validation(self) -> Samples:
        return self.splits["validation"]


class Prepared:
    """All sources of a config, in its order. Opening maps the files; no content is read before it is needed."""

    def __init__(self, sources: list[PreparedSource], facts: dict[str, Any]) -> None:
        """`facts`: what the task's preparation found in all sources together, and wrote down."""
        self.sources, self.facts = sources, facts
        self.training = [s for s in sources if len(s.train)]  # all records of a source may be held out
        names, weights = [s.name for s in self.training], [s.weight for s in self.training]
        self.effective_weights = {s.name: 0.0 for s in sources} | {
            name: quota / BLOCK_DRAWS for name, quota in zip(names, quotas(weights, names), strict=True)
        }

    @staticmethod
    def open(path: Path, open_splits: OpenSplits, patience_s: float = 30.0) -> Prepared:
        """Open prepared data. A file that another node has just written may take a while to be visible here."""
        index = _patiently(lambda: files.read_json(path), patience_s)
        sources = [
            _patiently(functools.partial(_open_source, path.parent / entry["folder"], entry, open_splits), patience_s)
            for entry in index["sources"]
        ]
        return Prepared(sources, {key: value for key, value in index.items() if key != "sources"})

    @property
    def fingerprints(self) -> dict[str, str]:
        """Source -> fingerprint of its content. Two runs with equal fingerprints see the same samples."""
        return {s.name: s.fingerprint for s in self.sources}

    def order(self, seed: int) -> Order:
        """The global order of the training samples over the sources `training`."""
        sizes, weights = [len(s.train) for s in self.training], [s.weight for s in self.training]
        return Order(sizes, weights, seed, [s.name for s in self.training])

    def shares(self, draws: int) -> list[str]:
        """For each source, in words: its samples, its share of these draws, and what is held out."""
        lines = []
        for s in self.sources:
            share = self.effective_weights[s.name]
            epochs = draws * share / max(len(s.train), 1)
            lines.append(f"{len(s.train):,} samples; weight {share:.4f}, {epochs:.2f} epochs")
        return lines


def check_unchanged(expected: dict[str, str], prepared: Prepared) -> None:
    """Raise UserError, with names, for sources that differ from those a run began with.

    expected: `Prepared.fingerprints` at that time. The error tells what changed, where the old folder still shows it.
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


def _open_source(folder: Path, entry: dict[str, Any], open_splits: OpenSplits) -> PreparedSource:
    meta = files.read_json(folder / "meta.json")
    return PreparedSource(entry["name"], entry["weight"], meta["fingerprint"], folder, open_splits(folder, meta), meta)


def _patiently(read: Callable[[], T], patience_s: float) -> T:
    """Repeat `read` for a while. On a shared filesystem another node's new file may be missing or short."""
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            return read()
        except (OSError, ValueError) as e:
            if time.monotonic() >= deadline_s:
                raise UserError(f"prepared data is missing or damaged: {e}\nremove its folder and start again") from e
            time.sleep(0.2)
