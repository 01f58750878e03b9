"""Folders of the cache from an older Muster: used where the ids are equal, else only by their own run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_data import bpe, config, jsonl, prepared

from configs.errors import UserError
from trainer.data import files
from trainer.data.open_tokens import open_tokens
from trainer.data.prepare import prepare
from trainer.data.prepared import check_unchanged


def refuse_to_read(*args: Any) -> None:
    raise AssertionError("a file was read again")


def as_of_old(folder: Path, fingerprint: str) -> Path:
    """Change a prepared folder so that it looks like one of the first way of cutting, which had no key `cuts`."""
    meta = files.read_json(folder / "meta.json")
    del meta["cuts"]
    files.write_json(folder / "meta.json", meta | {"fingerprint": fingerprint})
    return folder.rename(folder.with_name(f"{folder.name.rpartition('-')[0]}-{fingerprint[:16]}"))


def test_long_texts_prepared_in_the_older_way_serve_only_the_run_that_began_with_them(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/long.txt").write_text("the model learns text, code\n" * 8_000)
    keys = {"data__tokenizer": str(bpe(tmp_path / "t.json")), "data__validation_fraction": 0.0}
    cfg, cache, old = config({"name": "t", "path": str(tmp_path / "text")}, **keys), tmp_path / "cache", "0" * 32
    now = prepared(cache, cfg).fingerprints
    as_of_old(next(cache.glob("t-*")), old)
    assert prepared(cache, cfg).fingerprints == now
    began = prepare(cfg, cache, lambda line: None, lambda: False, began_with={"t": old})
    assert open_tokens(began, cfg).fingerprints == {"t": old}
    with pytest.raises(UserError, match="its long texts were cut where that can change ids"):
        check_unchanged({"t": old}, prepared(cache, cfg))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_what_the_older_way_prepared_alike_is_used(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place of a cut does not change bytes, and short texts were never cut."""
    words = "the model learns\n" * (20_000 if tokenizer == "bytes" else 5)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text(words)
    keys = {"data__tokenizer": "bytes" if tokenizer == "bytes" else str(bpe(tmp_path / "t.json"))}
    cfg = config({"name": "t", "path": str(tmp_path / "text")}, data__validation_fraction=0.0, **keys)
    as_of_old(next(iter(prepared(tmp_path / "cache", cfg).sources)).folder, "0" * 32)
    monkeypatch.setattr("trainer.data.prepare.read_file", refuse_to_read)
    assert prepared(tmp_path / "cache", cfg).fingerprints == {"t": "0" * 32}


def test_lines_prepared_in_the_older_way_are_looked_at_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only reading shows how long the lines are. If none is long, the fingerprint stays the same."""
    path = jsonl(tmp_path / "x.jsonl", documents=900)
    assert path.stat().st_size > 128 << 10
    keys = {"data__tokenizer": str(bpe(tmp_path / "t.json"))}
    cfg = config({"name": "t", "kind": "jsonl", "path": str(path)}, **keys)
    first = prepared(tmp_path / "cache", cfg)
    as_of_old(first.sources[0].folder, first.fingerprints["t"])
    assert prepared(tmp_path / "cache", cfg).fingerprints == first.fingerprints
    monkeypatch.setattr("trainer.data.prepare.read_file", refuse_to_read)
    assert prepared(tmp_path / "cache", cfg).fingerprints == first.fingerprints


def test_keys_of_records_are_not_noted_of_documents(tmp_path: Path) -> None:
    """Data prepared before `split` and `labels` became keys of a source is still found."""
    (tmp_path / "a.txt").write_text("the model learns\n" * 50)
    (source,) = prepared(tmp_path / "cache", config({"name": "t", "path": str(tmp_path / "a.txt")})).sources
    assert set(source.meta["source"]) == {"name", "kind", "path", "pattern", "field"}
    assert "test_fraction" not in source.meta
