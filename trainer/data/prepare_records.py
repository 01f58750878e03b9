"""Make samples of records once, into the cache, or find that this was done before; the counterpart of `prepare.py`.

`<cache>/<source>-<key>-<content>/` holds one source: the files of `columns.py` and, as for documents, `meta.json` and
`files.json`. The key covers how sources are read, and the content part is the fingerprint of this source.

The facts (vocabularies and scales) come from the training records of all sources together. So records are read twice:
to find the facts, and to make samples with them. `<cache>/run-<hash>.json` names the folders of one config, and has the
facts.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from configs.config import Config
from configs.errors import UserError
from configs.own import is_own, own_files
from configs.schema.data import DataSection, Source
from trainer.data import files
from trainer.data.cached import FILES, META, alike_folders, as_far_as_writable, still_holds
from trainer.data.columns import ColumnsWriter
from trainer.data.idx import labels_of
from trainer.data.listing import FileStat, is_in_package, list_files, source_root, stat_files
from trainer.data.order import quotas
from trainer.data.preparing import Progress, cache_errors, key_of
from trainer.data.records import Record, read_records
from trainer.data.sources import hash_file, new_hash

FORMAT = 1
SPLITS = ("train", "validation", "test")

Facts = dict[str, Any]


class Encoder(Protocol):
    """What a task tells about its records."""

    def about(self) -> dict[str, Any]:
        """The values that decide the samples, as plain data. Other values get another place in the cache."""

    def survey(self, records: Iterator[Record]) -> Facts:
        """The facts that the training records of all sources give, as JSON: vocabularies, means. Raises UserError."""

    def encode(self, record: Record, facts: Facts) -> Mapping[str, np.ndarray]:
        """The columns of a sample. Raises UserError that begins with `record.place`."""


@dataclass
class _Work:
    """One source while it is prepared."""

    source: Source
    settings: dict[str, Any]
    parts: list[Path]  # files that are read one by one
    found: list[tuple[str, Path]]  # all its files, with the files of labels that are read along
    stats: dict[str, FileStat]
    records: int = 0
    digest: str = ""  # hash over its records
    hashes: dict[str, str] = field(default_factory=dict)  # of its files

    def read(self, poll: Callable[[int], None]) -> Iterator[Record]:
        for path in self.parts or [Path(self.source.path)]:
            yield from read_records(self.source, path, poll)


def prepare_records(
    config: Config, task: Encoder, cache: Path, say: Callable[[str], None], should_stop: Callable[[], bool]
) -> Path:
    """Make every source of a config ready and return what `Prepared.open` takes. For one process, rank 0.

    say: takes progress lines, at most one a second and source; should_stop: asked several times a second. Raises
    UserError when the data are wrong, Interrupted when `should_stop` is true.
    """
    sources = config.data.sources
    trained = [source for source in sources if source.split in (None, "train")]
    quotas([s.weight for s in trained], [s.name for s in trained])  # refused before the work

    def progress(source: Source, what: str) -> Progress:
        return Progress(source.name, say, should_stop, what)

    with cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(cache)
        works = _works(config, task, progress)
        folders = _find(cache, works, progress) or _make(config, task, cache, works, progress)
        metas = [files.read_json(folder / META) for folder in folders]
        index = {
            "format": FORMAT,
            "kind": "records",
            "facts": metas[0]["facts"],
            "sources": [
                {"name": source.name, "weight": source.weight, "folder": folder.name}
                for source, folder in zip(sources, folders, strict=True)
            ],
        }
        path = cache / f"run-{key_of(index)}.json"
        if not path.exists():
            files.write_json(path, index)
    _check_held_out(config, metas)
    return path


_ProgressOf = Callable[[Source, str], Progress]


def _works(config: Config, task: Encoder, progress: _ProgressOf) -> list[_Work]:
    """All sources, listed before the work on any. The facts depend on all sources, so the settings of each name all."""
    listed = [(source, list_files(source, progress(source, "records").poll)) for source in config.data.sources]
    about = [_described(source) for source in config.data.sources]
    surveyed = [{**one, "path": "", "pattern": ""} for one in about]  # wherever the sources are
    works = []
    for (source, parts), one in zip(listed, about, strict=True):
        settings = {
            "format": FORMAT,
            "kind": "records",
            "source": one,
            "sources": surveyed,
            "validation_fraction": config.data.validation_fraction,
            "test_fraction": config.data.test_fraction,
            "task": task.about(),
        }
        if is_own(config.task.name):  # another code may make other samples
            settings["code"] = [sha256(path.read_bytes()).hexdigest() for path in own_files(config.task.name)]
        found = [*parts, *(labels_of(source, parts) if source.kind == "idx" else [])]
        stats = stat_files(source, found, progress(source, "records").poll)
        works.append(_Work(source, json.loads(json.dumps(settings)), [path for _, path in parts], found, stats))
    return works


def _described(source: Source) -> dict[str, Any]:
    described = {**source.model_dump(exclude={"weight", "field"}), "path": str(source_root(source))}
    if is_in_package(source):
        described["version"] = importlib.metadata.version("scikit-learn")
    return described


def _find(cache: Path, works: list[_Work], progress: _ProgressOf) -> list[Path] | None:
    """The folders with the present content of all files that were prepared together. A folder that was prepared with
    other records has other facts."""
    choices = []
    for work in works:
        own: dict[str, tuple[Path, dict[str, Any]]] = {}
        for folder, meta in alike_folders(cache, work.source, work.settings).items():
            own.setdefault(str(meta.get("surveyed")), (folder, meta))
        choices.append(own)
    for surveyed in choices[0]:
        together = [own[surveyed] for own in choices if surveyed in own]
        if len(together) == len(works) and all(
            still_holds(folder, meta, w.source, dict(w.found), w.stats, progress(w.source, "records").poll)
            for w, (folder, meta) in zip(works, together, strict=True)
        ):
            return [folder for folder, _ in together]
    return None


def _make(config: Config, task: Encoder, cache: Path, works: list[_Work], progress: _ProgressOf) -> list[Path]:
    for work in works:
        looked_at = progress(work.source, "files looked at")
        for name, path in work.found:
            work.hashes[name] = hash_file(work.source, path, looked_at.poll)
            looked_at.count += 1
    facts = _survey(config.data, task, works, progress)
    surveyed = key_of([work.digest for work in works])
    folders = []
    for work in works:
        told = {"surveyed": surveyed, "facts": facts, "records": work.records}
        known = {n: [stat.size_bytes, stat.mtime_ns, work.hashes[n]] for n, stat in work.stats.items()}
        split_by = work.source.split or [config.data.validation_fraction, config.data.test_fraction]
        told["fingerprint"] = fingerprint = _fingerprint(work.digest, split_by, facts, work.settings["task"])
        final = cache / f"{work.source.name}-{key_of(work.settings)}-{fingerprint[:16]}"
        folders.append(final)
        if final.is_dir():
            # Other files held the same records, or an earlier start was stopped after this source.
            with as_far_as_writable():
                files.write_json(final / FILES, known)
                files.write_json(final / META, {**files.read_json(final / META), **work.settings, **told})
            continue
        with files.temporary_folder(cache) as temporary:
            meta = {**work.settings, **told, "splits": _encode(config.data, task, work, facts, temporary, progress)}
            files.write_json(temporary / FILES, known)
            files.write_json(temporary / META, meta)
            if not files.publish(temporary, final):  # another start was faster: record the present files
                for file in (FILES, META):
                    (temporary / file).replace(final / file)
    return folders


def _fingerprint(digest: str, split_by: Any, facts: Facts, about: Any) -> str:
    fingerprint = new_hash()
    fingerprint.update(json.dumps([FORMAT, digest, split_by, facts, about], sort_keys=True).encode())
    return str(fingerprint.hexdigest())


def split_of(record: Record, source: Source, data: DataSection) -> str:
    """The split of a record, by its content. So it keeps its split whatever is added, and copies get the same split."""
    if source.split is not None:
        return source.split
    place = int.from_bytes(record.digest[:8], "little")
    if place < int(data.validation_fraction * 2**64):
        return "validation"
    return "test" if place < int((data.validation_fraction + data.test_fraction) * 2**64) else "train"


def _survey(data: DataSection, task: Encoder, works: list[_Work], progress: _ProgressOf) -> Facts:
    """The facts. Reads all records, and notes their number and hash for each source."""

    def training() -> Iterator[Record]:
        for work in works:
            digest, own = new_hash(), progress(work.source, "records surveyed")
            for record in work.read(own.poll):
                digest.update(record.digest)
                own.count += 1
                own.poll()
                if split_of(record, work.source, data) == "train":
                    yield record
            work.records, work.digest = own.count, digest.hexdigest()
            if not own.count:
                raise UserError(
                    f"data source {work.source.name!r} is empty: its files hold no record\n"
                    "set path or pattern of this data.sources entry"
                )

    records = training()
    first = next(records, None)
    if first is None:
        raise UserError(
            f"data.sources hold no record to train with, of {sum(work.records for work in works):,}\n"
            "add records, lower data.validation_fraction and data.test_fraction, or change `split` of a source"
        )
    facts = json.loads(json.dumps(task.survey(_chained(first, records))))  # in the form that a later start reads
    for _ in records:  # the records that the task did not read
        pass
    return dict(facts)


def _chained(first: Record, records: Iterator[Record]) -> Iterator[Record]:
    yield first
    yield from records


def _encode(
    data: DataSection, task: Encoder, work: _Work, facts: Facts, folder: Path, progress: _ProgressOf
) -> dict[str, Any]:
    """Write the samples of a source. Returns what `ColumnSamples` needs to know of each split."""
    writers = {split: ColumnsWriter(folder, split) for split in SPLITS}
    digest, own = new_hash(), progress(work.source, "records")
    try:
        for record in work.read(own.poll):
            digest.update(record.digest)
            own.count += 1
            own.poll()
            writers[split_of(record, work.source, data)].add(task.encode(record, facts))
        splits = {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    if digest.hexdigest() != work.digest:
        raise UserError(
            f"data source {work.source.name!r} changed while it was being read\nstart again when it is complete"
        )
    own.say(f"prepared {own.summary()}")
    return splits


def _check_held_out(config: Config, metas: list[dict[str, Any]]) -> None:
    """Raise UserError when validation is wanted and no sample is held out."""
    if config.train.validate_every_steps and not any(m["splits"]["validation"]["samples"] for m in metas):
        count = sum(m["records"] for m in metas)
        raise UserError(
            f"train.validate_every_steps is {config.train.validate_every_steps}, but none of {count:,} records is held "
            "out\nraise data.validation_fraction, give a source split: validation, or set train.validate_every_steps=0"
        )
