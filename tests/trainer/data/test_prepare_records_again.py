"""Samples of records: when they are found again, and when they are made anew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_records import (
    Images,
    NoWork,
    Table,
    config,
    fingerprints,
    folders,
    line,
    prepare,
    refuse_to_read,
    splits,
    table,
    touch,
)

from trainer.data import files
from trainer.data import prepare_records as module


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
    with monkeypatch.context() as context:  # touched but equal: the hash shows it, once
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
    assert (facts[0] == facts[1]) is not same_size  # the new record is held out, so the other file's samples stay
    assert [a == b for a, b in zip(fingerprints(again), fingerprints(index), strict=True)] == [False, not same_size]
    (tmp_path / "one.csv").write_text(text)  # back to the first text
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
    """The same table alone, beside another, and beside that one changed: each time the means differ."""
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
    """For each content of a file there are several samples. Only samples made together fit each other."""
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
