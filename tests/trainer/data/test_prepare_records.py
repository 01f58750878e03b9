"""Samples of records: how they are split and encoded, stopped and refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from small_records import (
    Images,
    NoWork,
    Table,
    config,
    folders,
    held,
    line,
    nothing,
    prepare,
    record,
    refuse_to_read,
    refused,
    splits,
    table,
)

from configs.schema.data import DataSection, Source
from trainer.data import files
from trainer.data import prepare_records as module
from trainer.data.columns import open_columns
from trainer.data.prepare_records import Facts, prepare_records, split_of
from trainer.data.prepared import Prepared
from trainer.data.preparing import Interrupted
from trainer.data.records import Record

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
    """And copies get the same split."""
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
    assert {a for a, b in ways if b != a} == {"train"}  # test records come only from the training split
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


def test_of_a_source_that_is_held_out_nothing_is_drawn(tmp_path: Path) -> None:
    """Its weight does not count, however small it is."""
    held_out = {**table(tmp_path / "a.csv"), "split": "validation", "weight": 1e-9}
    cfg = config(held_out, table(tmp_path / "b.csv"), {**table(tmp_path / "c.csv"), "weight": 3.0})
    found = Prepared.open(prepare(tmp_path / "cache", cfg), open_columns, patience_s=0.0)
    assert found.effective_weights == {"a": 0.0, "b": 0.25, "c": 0.75}
    source, sample, _ = found.order(1).draw(np.arange(1000))
    assert {found.training[s].name for s in source} == {"b", "c"}
    assert all(sample[i] < len(found.training[s].train) for i, s in enumerate(source))
    assert found.shares(100)[0] == "0 samples; weight 0.0000, 0.00 epochs"


def test_csv_and_parquet_of_one_table_give_equal_samples(tmp_path: Path) -> None:
    source = table(tmp_path / "t.csv")
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(source["path"]), tmp_path / "t.parquet", row_group_size=7)
    other = {"name": "t", "kind": "parquet", "path": str(tmp_path / "t.parquet")}
    one, two = (splits(prepare(tmp_path / "cache", config(s)))[0] for s in (source, other))
    # 1.0 is "1" in one file and 1.0 in the other: such records may change splits, but the samples are equal.
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
    """The other process publishes while this one still encodes."""
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
    for _ in range(2):  # once prepared, once found
        refused(lambda: prepare(cache, trained), "none of 60 records is held out", "validation_fraction")
    missing = config({**one, "path": str(tmp_path / "gone.csv")})
    refused(lambda: prepare(cache, missing), "gone.csv does not exist", "set the path")


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(lambda: prepare(tmp_path / "file" / "cache", config(table(tmp_path / "t.csv"))), "data.cache: cannot write")
