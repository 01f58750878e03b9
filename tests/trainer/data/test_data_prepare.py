"""Preparing: the content of the files, when it is done again, and that it can be stopped or killed anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_data import bpe, config, jsonl, prepared, text_folder

from configs.errors import UserError
from tests.distributed import RanksFailed, run_ranks
from tests.machine import takes_at_most
from trainer.data import files
from trainer.data.open_tokens import describe_tokens, tokens_of
from trainer.data.prepare import prepare
from trainer.data.prepared import Prepared, PreparedSource, check_unchanged
from trainer.data.preparing import Interrupted
from trainer.data.sources import read_file


def texts(source: PreparedSource, side: str) -> list[bytes]:
    """The documents of a split, read back. Checks the end tokens."""
    split = tokens_of(source, side)
    ends = [*split.starts[1:].tolist(), len(split.tokens)]
    found = []
    for begin, end in zip(split.starts.tolist(), ends, strict=True):
        document = split.tokens[begin:end]
        assert document[-1] == 256
        found.append(document[:-1].astype(np.uint8).tobytes())
    return found


def refuse_to_read(*args: Any) -> None:
    raise AssertionError("a file was read again")


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_every_document_stands_in_one_split_in_order(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "text")
    p = prepared(tmp_path / "cache", config({"name": "t", "path": str(folder)}))
    contents = [f.read_bytes() for f in sorted(folder.rglob("*.txt"), key=lambda f: f.relative_to(folder).as_posix())]
    held_out = [
        int.from_bytes(hashlib.blake2b(c, digest_size=16).digest()[:8], "little") < 0.2 * 2**64 for c in contents
    ]
    assert texts(p.sources[0], "train") == [c for c, h in zip(contents, held_out, strict=True) if not h]
    assert texts(p.sources[0], "validation") == [c for c, h in zip(contents, held_out, strict=True) if h]
    assert 2 <= sum(held_out) <= 20
    assert tokens_of(p.sources[0], "train").tokens.dtype == np.uint16
    assert (p.facts["tokenizer"]["size"], p.facts["tokenizer"]["end_token"]) == (257, 256)


def test_all_kinds_and_tokenizers_together(tmp_path: Path) -> None:
    tokens = np.concatenate([[i, i + 1, 0] for i in range(1, 250)])
    np.save(tmp_path / "x.npy", tokens)
    cfg = config(
        {"name": "text", "path": str(text_folder(tmp_path / "text"))},
        {"name": "lines", "kind": "jsonl", "path": str(jsonl(tmp_path / "x.jsonl")), "weight": 3.0},
        {"name": "ids", "kind": "tokens", "path": str(tmp_path / "x.npy")},
        data__tokenizer=str(bpe(tmp_path / "tokenizer.json")),
    )
    p = prepared(tmp_path / "cache", cfg)
    assert p.facts["tokenizer"]["end_token"] == 0
    assert sum(p.effective_weights.values()) == 1.0
    assert p.effective_weights["lines"] == pytest.approx(0.6, abs=1e-4)
    for s in p.sources:
        for split in (tokens_of(s, "train"), tokens_of(s, "validation")):
            assert np.all(split.tokens[split.starts[1:] - 1] == 0)
            assert np.count_nonzero(np.asarray(split.tokens) == 0) == len(split.starts)
    ids = p.sources[2]
    assert sum(len(tokens_of(ids, side).tokens) for side in ("train", "validation")) == len(tokens)
    lines = describe_tokens(p, cfg.train.steps * cfg.train.global_batch)
    assert len(lines) == 3
    assert "weight 0.6000" in lines[1]


def test_wide_ids_take_four_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([70_000, 5, 256] * 50))
    source = {"name": "ids", "kind": "tokens", "path": str(tmp_path / "x.npy")}
    p = prepared(tmp_path / "cache", config(source, model__vocab_size=70_001, data__validation_fraction=0.0))
    assert tokens_of(p.sources[0], "train").tokens.dtype == np.uint32
    assert tokens_of(p.sources[0], "train").tokens[0] == 70_000


def test_copies_of_a_document_land_on_the_same_side(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i % 50}"}) for i in range(500)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    cfg = config({"name": "j", "kind": "jsonl", "path": str(tmp_path / "x.jsonl")}, data__validation_fraction=0.5)
    s = prepared(tmp_path / "cache", cfg).sources[0]
    assert tokens_of(s, "validation").starts.size
    assert not set(texts(s, "train")) & set(texts(s, "validation"))


def test_prepared_data_is_used_again_and_touched_files_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = text_folder(tmp_path / "text"), tmp_path / "cache"
    cfg = config({"name": "t", "path": str(folder)})
    first = prepared(cache, cfg)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.data.prepare.read_file", refuse_to_read)
        patch.setattr("trainer.data.cached.hash_file", refuse_to_read)
        assert prepared(cache, cfg).fingerprints == first.fingerprints
    for file in folder.rglob("*.txt"):
        touch(file)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.data.prepare.read_file", refuse_to_read)
        assert prepared(cache, cfg).fingerprints == first.fingerprints
        patch.setattr("trainer.data.cached.hash_file", refuse_to_read)
        assert prepared(cache, cfg).fingerprints == first.fingerprints


def change(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(b"X" + content[1:])  # of the same size
    touch(file)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda folder: change(folder / "part0" / "000.txt"), "1 file changed (part0/000.txt)"),
        (lambda folder: (folder / "new.txt").write_text("new"), "1 file added (new.txt)"),
        (lambda folder: (folder / "part0" / "000.txt").unlink(), "1 file removed (part0/000.txt)"),
    ],
)
def test_a_changed_source_is_refused_by_name(tmp_path: Path, what: Any, said: str) -> None:
    folder, cache = text_folder(tmp_path / "text"), tmp_path / "cache"
    other = {"name": "other", "kind": "jsonl", "path": str(jsonl(tmp_path / "x.jsonl"))}
    cfg = config({"name": "t", "path": str(folder)}, other)
    first = prepared(cache, cfg)
    check_unchanged(first.fingerprints, first)
    what(folder)
    second = prepared(cache, cfg)
    assert second.fingerprints["other"] == first.fingerprints["other"]
    with pytest.raises(UserError) as e:
        check_unchanged(first.fingerprints, second)
    assert f"data source 't' changed since this run began: {said}" in str(e.value)
    # A run that has the old data mapped still has it.
    assert len(texts(first.sources[0], "train")) > 10
    with pytest.raises(UserError, match=r"data source 't' changed since.*its fingerprint was 000000000000"):
        check_unchanged({**first.fingerprints, "t": "0" * 32}, second)


def test_other_sources_and_settings_are_refused_by_name(tmp_path: Path) -> None:
    source = {"name": "t", "path": str(text_folder(tmp_path / "text"))}
    first = prepared(tmp_path / "cache", config(source))
    with pytest.raises(UserError, match="'u' is gone"):
        check_unchanged({**first.fingerprints, "u": "0"}, first)
    with pytest.raises(UserError, match="'t' is new"):
        check_unchanged({}, first)
    with pytest.raises(UserError, match=r"'t' changed since.*validation_fraction was 0.2, is 0.3"):
        check_unchanged(first.fingerprints, prepared(tmp_path / "cache", config(source, data__validation_fraction=0.3)))


def test_a_restored_source_is_accepted_again(tmp_path: Path) -> None:
    folder, cache = text_folder(tmp_path / "text"), tmp_path / "cache"
    cfg = config({"name": "t", "path": str(folder)})
    first = prepared(cache, cfg)
    before = (folder / "part0" / "000.txt").read_bytes()
    change(folder / "part0" / "000.txt")
    prepared(cache, cfg)
    (folder / "part0" / "000.txt").write_bytes(before)
    check_unchanged(first.fingerprints, prepared(cache, cfg))


def test_a_stop_leaves_finished_sources_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, said = tmp_path / "cache", []
    one = {"name": "one", "path": str(text_folder(tmp_path / "one"))}
    two = {"name": "two", "path": str(text_folder(tmp_path / "two", seed=5))}
    monkeypatch.setattr("trainer.data.preparing._POLL_S", 0.0)
    polls = 0

    def stop() -> bool:
        nonlocal polls
        polls += 1
        return any("one: prepared" in line for line in said) and "part1" in str(reading[-1:])

    reading: list[Path] = []
    monkeypatch.setattr(
        "trainer.data.prepare.read_file", lambda s, path, *a: (reading.append(path), read_file(s, path, *a))[1]
    )
    with pytest.raises(Interrupted):
        prepare(config(one, two), cache, said.append, stop)
    assert polls > 40
    assert [p.name.split("-")[0] for p in cache.iterdir()] == ["one"]
    said.clear()
    prepare(config(one, two), cache, said.append, lambda: False)
    assert [line.split(":")[0] for line in said] == ["data two"]


@pytest.mark.parametrize("kind", ["text", "jsonl", "tokens", "bpe", "again"])
def test_a_stop_is_seen_soon_and_progress_comes_once_a_second(tmp_path: Path, kind: str) -> None:
    """Whatever a source is made of, `should_stop` is asked several times a second."""
    rng = np.random.default_rng(0)
    source = {"name": "big", "kind": "text", "path": str(tmp_path / "x")}
    keys: dict[str, Any] = {}
    if kind in ("text", "again"):
        (tmp_path / "x").write_bytes(rng.integers(97, 123, 40_000_000, dtype=np.uint8).tobytes())
    elif kind == "bpe":
        (tmp_path / "x").write_text("the model learns from text and code\n" * 100_000)
        keys = {"data__tokenizer": str(bpe(tmp_path / "t.json"))}
    elif kind == "jsonl":
        source["kind"] = "jsonl"
        line = json.dumps({"text": "words " * 20}) + "\n"
        (tmp_path / "x").write_text(line * 60_000)
    else:
        source.update(kind="tokens", path=str(tmp_path / "x.npy"))
        np.save(tmp_path / "x.npy", rng.integers(0, 257, 8_000_000, dtype=np.uint16))
    cfg = config(source, data__validation_fraction=0.0, **keys)
    if kind == "again":
        prepare(cfg, tmp_path / "cache", lambda line: None, lambda: False)
        touch(tmp_path / "x")
    asked_s, said_s = [time.process_time()], []
    prepare(
        cfg,
        tmp_path / "cache",
        lambda line: said_s.append(time.monotonic()),
        lambda: asked_s.append(time.process_time()) or False,
    )
    asked_s.append(time.process_time())
    # Ten times a second or more on a free machine; the bound leaves room for a slow one.
    assert max(np.diff(asked_s)) < 1.0
    assert np.median(np.diff(asked_s)) < 0.3
    progress_s = said_s[:-1]  # the last line reports the end
    assert all(gap > 0.99 for gap in np.diff(progress_s))


def test_memory_stays_bounded(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text((json.dumps({"text": "words " * 200}) + "\n") * 2_500)
    (tmp_path / "big.txt").write_bytes(b"one long document\n" * 1_000_000)
    np.save(tmp_path / "x.npy", np.tile(np.arange(257, dtype=np.uint16), 40_000))
    cfg = config(
        {"name": "j", "kind": "jsonl", "path": str(tmp_path / "x.jsonl")},
        {"name": "t", "path": str(tmp_path / "big.txt")},
        {"name": "n", "kind": "tokens", "path": str(tmp_path / "x.npy")},
        data__validation_fraction=0.0,
    )
    tracemalloc.start()
    try:
        prepare(cfg, tmp_path / "cache", lambda line: None, lambda: False)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 12e6, f"{peak_bytes / 1e6:.0f} MB for 40 MB of data"


def prepare_until(at: int, source: dict[str, Any], cache: str) -> int:
    """Prepare in a process of its own, which is killed right before one of its operations; how many there are."""
    calls = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

    for name in ("fsync", "rename", "replace", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    prepare(config(source), Path(cache), print, lambda: False)
    return calls


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.full)])
def test_killed_anywhere_the_next_start_is_whole_and_clears_up(every: int, tmp_path: Path) -> None:
    source = {"name": "t", "path": str(text_folder(tmp_path / "text"))}
    expected = prepared(tmp_path / "expected", config(source))
    (calls,) = run_ranks(1, prepare_until, -1, source, str(tmp_path / "whole"))
    assert calls >= 8
    for at in range(2, calls + 1, every):
        cache = tmp_path / f"cache{at}"
        with pytest.raises(RanksFailed, match="died"):
            run_ranks(1, prepare_until, at, source, str(cache))
        p = prepared(cache, config(source))
        assert p.fingerprints == expected.fingerprints
        assert texts(p.sources[0], "train") == texts(expected.sources[0], "train")
        left = [f.name for f in cache.glob(".tmp-*") if f.is_dir() and (f / "lock").exists()]
        assert left == []


def test_leftovers_of_the_living_stay(tmp_path: Path) -> None:
    with files.temporary_folder(tmp_path) as mine:
        files.remove_leftovers(tmp_path)
        assert mine.is_dir()
        dead = tmp_path / ".tmp-1-dead"
        dead.mkdir()
        (dead / "lock").touch()
        old = tmp_path / ".tmp-1-old"
        old.mkdir()
        (old / "new-lock").touch()
        for path in (old / "new-lock", old):
            os.utime(path, (0, 0))
        files.remove_leftovers(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [mine.name]
    assert list(tmp_path.iterdir()) == []


def test_two_starts_at_once_give_one_folder(tmp_path: Path) -> None:
    source = {"name": "t", "path": str(text_folder(tmp_path / "text"))}
    run_ranks(2, prepare_until, -1, source, str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").glob("t-*"))) == 1
    assert len(texts(prepared(tmp_path / "cache", config(source)).sources[0], "train")) > 10


def test_token_files_without_an_end_token_are_warned_about(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(100))
    source = {"name": "ids", "kind": "tokens", "path": str(tmp_path / "x.npy")}
    said: list[str] = []
    prepare(config(source, data__validation_fraction=0.0), tmp_path / "cache", said.append, lambda: False)
    assert "data ids: warning: no end token (256)" in said[0]


def test_the_standard_library_in_time(tmp_path: Path) -> None:
    cfg = config({"name": "stdlib", "path": "python:stdlib"}, data__validation_fraction=0.01)
    found: list[Prepared] = []
    takes_at_most(5.0, lambda: found.append(prepared(tmp_path / f"cache{len(found)}", cfg)))
    p = found[0]
    assert len(tokens_of(p.sources[0], "train").tokens) > 5_000_000
    assert tokens_of(p.sources[0], "validation").sample_count(256) > 10
