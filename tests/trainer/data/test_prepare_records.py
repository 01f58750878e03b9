"""Samples of records: how they are split and encoded, and when that is done again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest

from configs.config import Config
from configs.errors import UserError
from configs.schema.data import DataSection, Source
from trainer.data import files
from trainer.data import prepare_records as module
from trainer.data.columns import ColumnSamples, open_columns
from trainer.data.prepare_records import Facts, prepare_records, split_of
from trainer.data.preparing import Interrupted
from trainer.data.records import Record, digest_of

Splits = dict[str, ColumnSamples]


def nothing(line: str) -> None:
    pass


class Table:
    """Columns of numbers, less the mean of the training records; the label by its place among those."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.surveyed: list[str] = []

    def about(self) -> dict[str, Any]:
        return {"scale": self.scale, "columns": ("x", "y")}

    def survey(self, records: Iterator[Record]) -> Facts:
        count, total, labels = 0, 0.0, set()
        for record in records:
            count, total = count + 1, total + float(record.values["x"])
            labels.add(str(record.values["label"]))
            self.surveyed.append(record.place)
        return {"mean": total / count, "labels": sorted(labels)}

    def encode(self, record: Record, facts: Facts) -> Mapping[str, np.ndarray]:
        label = str(record.values["label"])
        if label not in facts["labels"]:
            raise UserError(f"{record.place}: the label {label!r} is not among the training records")
        x = (float(record.values["x"]) - facts["mean"]) * self.scale
        return {
            "x": np.array([x, float(record.values["y"])], np.float32),
            "text": np.frombuffer(label.encode(), np.uint8),
            "label": np.array(facts["labels"].index(label)),
        }


class Images:
    """Needs no survey, and does not look."""

    def about(self) -> dict[str, Any]:
        return {}

    def survey(self, records: Iterator[Record]) -> Facts:
        return {}

    def encode(self, record: Record, facts: Facts) -> Mapping[str, np.ndarray]:
        return {"image": np.asarray(record.values["image"]), "label": np.array(record.values["label"])}


class NoWork(Table):
    def survey(self, records: Iterator[Record]) -> Facts:
        raise AssertionError("surveyed again")

    def encode(self, record: Record, facts: Facts) -> Mapping[str, np.ndarray]:
        raise AssertionError("encoded again")


def config(*sources: dict[str, Any], validate: int = 0, **data: Any) -> Config:
    """As it will be for a task of records: today every config has a language model."""
    raw = {
        "model": {"vocab_size": 300, "dim": 8, "layers": 1, "heads": 1, "mlp_dim": 8, "max_seq_len": 64},
        "data": {"seq_len": 8, "sources": [{"name": "documents", "path": "x"}]},
        "train": {"steps": 5, "global_batch": 8, "micro_batch": 2, "validate_every_steps": validate},
    }
    section = {"seq_len": 8, "validation_fraction": 0.2, "test_fraction": 0.1, "sources": list(sources), **data}
    return Config.model_validate(raw).model_copy(update={"data": DataSection.model_validate(section)})


def line(i: int) -> str:
    return f"{i},{i / 4},{'a' * (i % 3 + 1)}"


def table(path: Path, rows: Iterator[int] | range = range(60)) -> dict[str, Any]:
    path.write_text("\n".join(["x,y,label", *map(line, rows)]) + "\n")
    return {"name": path.stem, "kind": "csv", "path": str(path)}


def prepare(cache: Path, cfg: Config, task: Any = None, say: Callable[[str], None] = nothing) -> Path:
    return prepare_records(cfg, task or Table(), cache, say, lambda: False)


def folders(index: Path) -> list[Path]:
    return [index.parent / source["folder"] for source in files.read_json(index)["sources"]]


def splits(index: Path) -> list[Splits]:
    return [open_columns(folder, files.read_json(folder / "meta.json")) for folder in folders(index)]


def fingerprints(index: Path) -> list[str]:
    return [files.read_json(folder / "meta.json")["fingerprint"] for folder in folders(index)]


def held(samples: ColumnSamples, mean: float = 0.0) -> list[int]:
    """Which rows, by y."""
    return [round(4 * float(samples.read(i)["x"][1])) for i in range(len(samples))]


def record(i: int, label: str | None = None) -> Record:
    values = {"x": str(i), "y": str(i / 4), "label": label or line(i).split(",")[2]}
    return Record(digest_of(values), "", values)


def refused(act: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(UserError) as error:
        act()
    assert 1 <= len(str(error.value).splitlines()) <= 2
    assert [part for part in parts if part not in str(error.value)] == []


# ---- splits, facts, samples ------------------------------------------------------------------------------------------


def test_every_record_stands_in_one_split_and_facts_are_of_the_training_split(tmp_path: Path) -> None:
    cfg = config(table(tmp_path / "t.csv"))
    task = Table()
    index = prepare(tmp_path / "cache", cfg, task)
    told = files.read_json(index)
    (found,) = splits(index)
    sides = {s: [i for i in range(60) if split_of(record(i), cfg.data.sources[0], cfg.data) == s] for s in found}
    assert {split: held(samples) for split, samples in found.items()} == sides
    assert all(len(rows) > 1 for rows in sides.values())
    assert len(sides["validation"]) > len(sides["test"])
    assert len(task.surveyed) == len(sides["train"])
    assert (told["kind"], told["format"], set(told)) == ("records", 1, {"format", "kind", "facts", "sources"})
    assert told["facts"] == {"mean": pytest.approx(np.mean(sides["train"])), "labels": ["a", "aa", "aaa"]}
    first, i = found["train"].read(0), sides["train"][0]
    assert first["x"].tolist() == [np.float32(i - told["facts"]["mean"]), i / 4]
    assert (bytes(first["text"]).decode(), int(first["label"])) == (line(i).split(",")[2], i % 3)


def test_a_record_keeps_its_side_whatever_is_added(tmp_path: Path) -> None:
    """And copies stand beside it."""
    first = config(table(tmp_path / "t.csv", range(30)))
    (before,) = splits(prepare(tmp_path / "cache", first))
    second = config(table(tmp_path / "t.csv", [*range(50, 0, -1), *range(30)]))
    (after,) = splits(prepare(tmp_path / "cache", second))
    for split in before:
        assert set(held(before[split])) <= set(held(after[split]))
    sides = [set(held(samples)) for samples in after.values()]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 51


def test_bands_of_a_split_do_not_depend_on_each_other() -> None:
    source = Source(name="s", kind="csv", path="x")
    held_out, tested = (
        DataSection(seq_len=8, sources=[source], validation_fraction=0.3, test_fraction=t) for t in (0, 0.3)
    )
    ways = [(split_of(record(i), source, held_out), split_of(record(i), source, tested)) for i in range(2000)]
    assert {a for a, b in ways if b != a} == {"train"}  # test records come of the training split alone
    assert 500 < sum(b == "test" for _, b in ways) < 700
    assert 500 < sum(a == "validation" for a, _ in ways) < 700


def test_a_source_may_name_its_split(tmp_path: Path) -> None:
    cfg = config(
        table(tmp_path / "one.csv"),
        {**table(tmp_path / "two.csv", range(60, 70)), "split": "test"},
        {**table(tmp_path / "three.csv", range(70, 80)), "split": "train"},
    )
    one, two, three = splits(prepare(tmp_path / "cache", cfg))
    assert [len(two[split]) for split in module.SPLITS] == [0, 0, 10]
    assert held(three["train"]) == list(range(70, 80))
    assert len(one["train"]) + len(one["validation"]) + len(one["test"]) == 60


def test_csv_and_parquet_of_one_table_give_equal_samples(tmp_path: Path) -> None:
    source = table(tmp_path / "t.csv")
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(source["path"]), tmp_path / "t.parquet", row_group_size=7)
    other = {"name": "t", "kind": "parquet", "path": str(tmp_path / "t.parquet")}
    one, two = (splits(prepare(tmp_path / "cache", config(s)))[0] for s in (source, other))
    # 1.0 is "1" in the one and 1.0 in the other: such records may change sides, the samples are the same
    rows = [{k: {y: s[k].read(i) for i, y in enumerate(held(s[k]))} for k in s} for s in (one, two)]
    assert {k: list(v) for k, v in rows[0].items()} == {k: list(v) for k, v in rows[1].items()}
    for split, samples in rows[0].items():
        for y, sample in samples.items():
            for name in sample:
                np.testing.assert_array_equal(sample[name], rows[1][split][y][name])


def test_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config({"name": "digits", "kind": "idx", "path": "python:digits"})
    index = prepare(tmp_path / "cache", cfg, Images())
    (found,) = splits(index)
    assert sum(map(len, found.values())) == 1797
    sample = found["train"].read(0)
    assert (sample["image"].shape, sample["image"].dtype, sample["label"].shape) == ((8, 8), np.uint8, ())
    refuse_to_read(monkeypatch)
    assert prepare(tmp_path / "cache", cfg, Images()) == index


# ---- again -----------------------------------------------------------------------------------------------------------


def refuse_to_read(monkeypatch: pytest.MonkeyPatch, hashing: bool = True) -> None:
    def read(*args: Any) -> None:
        raise AssertionError("a file was read again")

    monkeypatch.setattr(module, "read_records", read)
    if hashing:
        monkeypatch.setattr(module, "hash_file", read)
        monkeypatch.setattr("trainer.data.cached.hash_file", read)


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_what_was_prepared_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [table(tmp_path / "one.csv"), {**table(tmp_path / "two.csv", range(60, 90)), "split": "train"}]
    index = prepare(tmp_path / "cache", config(*sources))
    entries = sorted(tmp_path.joinpath("cache").iterdir())
    with monkeypatch.context() as context:
        refuse_to_read(context)
        assert prepare(tmp_path / "cache", config(*sources), NoWork()) == index
        assert sorted(tmp_path.joinpath("cache").iterdir()) == entries
        heavier = prepare(tmp_path / "cache", config({**sources[0], "weight": 3.0}, sources[1]), NoWork())
        assert folders(heavier) == folders(index)
    with monkeypatch.context() as context:  # touched, and equal: the hash tells, once
        touch(tmp_path / "one.csv")
        refuse_to_read(context, hashing=False)
        assert prepare(tmp_path / "cache", config(*sources), NoWork()) == index
        refuse_to_read(context)
        assert prepare(tmp_path / "cache", config(*sources), NoWork()) == index


def test_moved_files_are_found_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = table(tmp_path / "t.csv")
    index = prepare(tmp_path / "cache", config(source))
    (tmp_path / "there").mkdir()
    (tmp_path / "t.csv").rename(tmp_path / "there" / "t.csv")
    refuse_to_read(monkeypatch, hashing=False)
    moved = {**source, "path": str(tmp_path / "there" / "t.csv")}
    assert prepare(tmp_path / "cache", config(moved), NoWork()) == index


@pytest.mark.parametrize("same_size", [True, False])
def test_a_changed_file_is_prepared_again(tmp_path: Path, same_size: bool) -> None:
    one, two = table(tmp_path / "one.csv"), {**table(tmp_path / "two.csv", range(60, 90)), "split": "test"}
    index = prepare(tmp_path / "cache", config(one, two))
    text = (tmp_path / "one.csv").read_text()
    (tmp_path / "one.csv").write_text(text.replace("\n8,", "\n9,", 1) if same_size else text + line(99) + "\n")
    touch(tmp_path / "one.csv")
    again = prepare(tmp_path / "cache", config(one, two))
    assert again != index
    facts = [files.read_json(i)["facts"] for i in (index, again)]
    assert (facts[0] == facts[1]) is not same_size  # the new record is held out: what was made of the other file stays
    assert [a == b for a, b in zip(fingerprints(again), fingerprints(index), strict=True)] == [False, not same_size]
    (tmp_path / "one.csv").write_text(text)  # and back
    assert prepare(tmp_path / "cache", config(one, two), Table()) == index


def test_changed_labels_of_images_are_seen(tmp_path: Path) -> None:
    images = np.arange(40, dtype=np.uint8).reshape(10, 2, 2)
    path = tmp_path / "images.idx"
    path.write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 10, 0, 0, 0, 2, 0, 0, 0, 2]) + images.tobytes())
    cfg = config({"name": "s", "kind": "idx", "path": str(path), "split": "train"})
    for number in (1, 2):
        (tmp_path / "labels.idx").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 10, *[number] * 10]))
        touch(tmp_path / "labels.idx") if number == 2 else None
        (found,) = splits(prepare(tmp_path / "cache", cfg, Images()))
        assert {int(found["train"].read(i)["label"]) for i in range(10)} == {number}


def test_facts_of_other_sources_are_not_taken(tmp_path: Path) -> None:
    """The same table alone, beside another, and beside that one changed: each time other means."""
    one, two = table(tmp_path / "one.csv"), table(tmp_path / "two.csv", range(100, 160))
    cache = tmp_path / "cache"
    indices = [prepare(cache, config(one)), prepare(cache, config(one, two))]
    table(tmp_path / "two.csv", range(200, 260))
    indices += [prepare(cache, config(one, two)), prepare(cache, config(one, two, validation_fraction=0.4))]
    indices.append(prepare(cache, config(one, two), Table(scale=2.0)))
    assert len({folders(index)[0] for index in indices}) == len({fingerprints(index)[0] for index in indices}) == 5
    assert len({json.dumps(files.read_json(index)["facts"]) for index in indices}) == 4


def test_a_source_that_stood_beside_others_is_prepared_alone(tmp_path: Path) -> None:
    one, two = table(tmp_path / "one.csv"), table(tmp_path / "two.csv", range(100, 160))
    for number, sources in enumerate([(one, two), (one,), (two, one), (two,)]):
        cfg = config(*sources)
        index, fresh = prepare(tmp_path / "cache", cfg), prepare(tmp_path / f"fresh{number}", cfg)
        assert files.read_json(index)["facts"] == files.read_json(fresh)["facts"]


def test_files_that_change_to_and_fro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each content of a file there are several samples: only those made together belong together."""
    known: dict[tuple[int, int], Path] = {}
    for state in [(0, 0), (0, 1), (1, 1), (1, 0)] * 2:
        one, two = (table(tmp_path / f"{n}.csv", range(100 * n + 7 * i, 100 * n + 60)) for n, i in enumerate(state))
        cfg = config({**one, "split": "train"}, two)
        if state in known:
            monkeypatch.setattr(module, "read_records", None)
        index = prepare(tmp_path / "cache", cfg)
        assert known.setdefault(state, index) == index
    assert len({json.dumps(files.read_json(index)["facts"]) for index in known.values()}) == 4


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    """Not of the name, the place or the kind of file."""
    one = table(tmp_path / "one.csv", range(20))
    text = (tmp_path / "one.csv").read_text().splitlines()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.csv").write_text("\n".join(text[:9]))
    (tmp_path / "parts" / "b.csv").write_text("\n".join([text[0], "", *text[9:]]))
    parts = {"name": "parts", "kind": "csv", "path": str(tmp_path / "parts")}
    assert fingerprints(prepare(tmp_path / "cache", config(one))) == fingerprints(
        prepare(tmp_path / "cache", config(parts))
    )


# ---- stopped, in the way of each other, refused ----------------------------------------------------------------------


def test_a_stop_is_heard_and_finished_sources_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.preparing._POLL_S", 0.0)
    cfg = config(table(tmp_path / "one.csv"), table(tmp_path / "two.csv", range(60, 90)))
    said: list[str] = []
    cache = tmp_path / "cache"
    with pytest.raises(Interrupted):
        prepare_records(cfg, Table(), cache, said.append, lambda: bool(said))
    assert len(said) == 1
    assert said[0].startswith("data one: prepared 60 records")
    assert [path.name[:4] for path in cache.iterdir()] == ["one-"]
    begun = next(cache.iterdir())
    encoded: list[str] = []

    class Counting(Table):
        def encode(self, record: Record, facts: Facts) -> Mapping[str, np.ndarray]:
            encoded.append(record.place)
            return super().encode(record, facts)

    index = prepare(cache, cfg, Counting())
    assert folders(index)[0] == begun
    assert len(encoded) == 30
    assert {place.rpartition(":")[0] for place in encoded} == {str(tmp_path / "two.csv")}
    with pytest.raises(Interrupted):
        prepare_records(cfg, NoWork(), tmp_path / "other", nothing, lambda: True)


def test_two_that_prepare_at_once_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one publishes while this one still encodes."""
    cfg, cache = config(table(tmp_path / "t.csv")), tmp_path / "cache"
    others: list[Path] = []

    class Slow(Table):
        def encode(self, record: Record, facts: Facts) -> Mapping[str, np.ndarray]:
            if not others:
                others.append(prepare(cache, cfg))
            return super().encode(record, facts)

    index = prepare(cache, cfg, Slow())
    assert index == others[0]
    assert sorted(path.name for path in cache.iterdir()) == sorted([index.name, folders(index)[0].name])
    refuse_to_read(monkeypatch)
    assert prepare(cache, cfg, NoWork()) == index


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    cfg = config(table(tmp_path / "t.csv"))

    class Changing(Table):
        def survey(self, records: Iterator[Record]) -> Facts:
            facts = super().survey(records)
            table(tmp_path / "t.csv", range(61))
            return facts

    refused(lambda: prepare(tmp_path / "cache", cfg, Changing()), "'t' changed while it was being read", "start again")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_task_refuses_has_its_place(tmp_path: Path) -> None:
    one = table(tmp_path / "one.csv")
    (tmp_path / "two.csv").write_text("x,y,label\n1,2,zebra\n")
    two = {"name": "two", "kind": "csv", "path": str(tmp_path / "two.csv"), "split": "test"}
    refused(lambda: prepare(tmp_path / "cache", config(one, two)), f"{tmp_path}/two.csv:2: the label 'zebra'")


def test_nothing_to_learn_from_is_refused(tmp_path: Path) -> None:
    cache, one, two = tmp_path / "cache", table(tmp_path / "one.csv"), table(tmp_path / "two.csv", range(0))
    refused(lambda: prepare(cache, config(one, two)), "data source 'two' is empty", "set path or pattern")
    refused(lambda: prepare(cache, config({**two, "split": "test"}, one)), "data source 'two' is empty")
    tested = config({**one, "split": "test"})
    refused(lambda: prepare(cache, tested), "no record to train with, of 60", "`split` of a source")
    trained = config({**one, "split": "train"}, validate=5)
    for _ in range(2):  # prepared, and found
        refused(lambda: prepare(cache, trained), "none of 60 records is held out", "validation_fraction")
    missing = config({**one, "path": str(tmp_path / "gone.csv")})
    refused(lambda: prepare(cache, missing), "gone.csv does not exist", "set the path")


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(lambda: prepare(tmp_path / "file" / "cache", config(table(tmp_path / "t.csv"))), "data.cache: cannot write")
