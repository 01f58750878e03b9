"""Files that are missing, or do not fit their source's kind, are named and refused before any work."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_data import config, jsonl, prepared, text_folder

from configs.errors import UserError
from configs.schema.data import Source
from trainer.data import listing
from trainer.data.content import check_content, content_of
from trainer.data.listing import FileStat, list_files
from trainer.data.prepare import prepare


def refusal(kind: str, path: Path, pattern: str = "**/*") -> list[str]:
    """The lines with which preparing a source is refused. The cache must then hold nothing of it."""
    cache = path.parent / "cache"
    with pytest.raises(UserError) as e:
        prepared(cache, config({"name": "s", "kind": kind, "path": str(path), "pattern": pattern}))
    assert list(cache.iterdir()) == []
    lines = str(e.value).splitlines()
    assert len(lines) == 2
    return lines


def warnings(source: Source) -> list[str]:
    said: list[str] = []
    check_content(source, list_files(source, lambda: None), said.append, lambda: None)
    return said


# ---- what is not there ----------------------------------------------------------------------------------------------


def test_dead_links_are_named_three_and_counted(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "text", documents=3)
    for i in range(7):
        (folder / f"{i}.txt").symlink_to(tmp_path / f"gone/{i}.txt")
    (folder / "part").symlink_to(tmp_path / "gone/part")
    (folder / "libx.so").symlink_to("libx.so.1")
    said, advice = refusal("text", folder, "**/*.txt")
    assert "8 of its 11 files cannot be read: 0.txt (a link to" in said
    assert said.count("which is gone") == 3
    assert said.endswith("...")
    assert "remove them" in advice
    for link in folder.glob("[0-9].txt"):
        link.unlink()
    assert "1 of its 4 files cannot be read: part (a link to" in refusal("text", folder, "**/*.txt")[0]
    (folder / "part").unlink()
    # A name that the pattern leaves out, or a folder that it does not reach, is not missed.
    prepared(tmp_path / "cache", config({"name": "s", "path": str(folder), "pattern": "**/*.txt"}))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: os.mkfifo(path), "x.txt (a pipe, socket or device)"),
        (lambda path: path.symlink_to("/dev/zero"), "x.txt (a pipe, socket or device)"),
        (lambda path: path.symlink_to(path), "x.txt (Too many levels of symbolic links)"),
    ],
)
def test_what_is_no_file_is_named(tmp_path: Path, make: Callable[[Path], None], said: str) -> None:
    folder = text_folder(tmp_path / "text", documents=9)
    make(folder / "x.txt")
    assert f"1 of its 10 files cannot be read: {said}" in refusal("text", folder)[0]
    prepared(tmp_path / "cache", config({"name": "s", "path": str(folder), "pattern": "part*/*"}))


def test_files_that_go_between_listing_and_reading_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = text_folder(tmp_path / "text", documents=9)
    listed, stated = list_files, FileStat.of

    def then_gone(*args: object) -> object:
        found = listed(*args)  # type: ignore[arg-type]
        for _, path in found[:4]:
            path.unlink()
        return found

    monkeypatch.setattr("trainer.data.prepare.list_files", then_gone)
    assert "4 of its 9 files cannot be read: part0/000.txt (No such file" in refusal("text", folder)[0]
    monkeypatch.undo()

    def gone_after(path: Path) -> FileStat:
        stat = stated(path)
        if path.name == "005.txt":
            path.unlink()
        return stat

    monkeypatch.setattr(listing.FileStat, "of", staticmethod(gone_after))
    assert "1 of its 5 files cannot be read: part2/005.txt (No such file" in refusal("text", folder)[0]


def test_a_path_that_is_no_file_or_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, said in (
        (tmp_path / "link", f"{tmp_path}/link (a link to {tmp_path}/gone) does not exist"),
        (tmp_path / "loop", "does not exist"),
        (Path("/dev/zero"), "/dev/zero is neither a file nor a folder"),
    ):
        with pytest.raises(UserError) as e:
            list_files(Source(name="s", path=str(path)), lambda: None)
        assert said in str(e.value)


# ---- what is something else -----------------------------------------------------------------------------------------


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.arange(3))
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text")
    return file.getvalue()


LINES = "".join(json.dumps({"text": f"document {i}", "id": i}) + "\n" for i in range(9)).encode()
RUSSIAN = "Все счастливые семьи похожи друг на друга. " * 20
RANDOM = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8).tobytes()

OTHER_KINDS = {
    "Parquet": b"PAR1\x15\x04\x15\x80\x00\x00L\x15" + RANDOM + b"PAR1",
    "gzip": gzip.compress(LINES),
    "zip": zipped(),
    "a .npy array": npy(np.arange(300)),
    "a Python pickle": pickle.dumps({"text": ["a"] * 100}),
    "an image": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + RANDOM[:500],
    "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n" * 9,
    "UTF-16 or UTF-32": RUSSIAN.encode("utf-16"),
    "binary": "plain words ".encode("utf-16-le") * 9,
    "not UTF-8": RUSSIAN.encode("cp1251"),
}


@pytest.mark.parametrize("what", OTHER_KINDS)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.bin").write_bytes(OTHER_KINDS[what])
    for kind in ("text", "jsonl", "tokens"):
        if (kind, what) != ("tokens", "a .npy array"):
            said, _ = refusal(kind, folder)
            assert f"has kind {kind}, but 1 of its 1 files are something else: a.bin ({what})" in said
    # One such file among others is enough. The pattern in the message leaves it out.
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"a text {i} " * 20)
    said, advice = refusal("text", folder)
    assert f"1 of its 4 files are something else: a.bin ({what})" in said
    shown = advice.split("for example to ")[1]
    assert shown == "**/*.txt"
    prepared(tmp_path / "cache", config({"name": "s", "path": str(folder), "pattern": shown}))


@pytest.mark.parametrize(
    ("content", "kind", "fits"),
    [
        (LINES, "text", "jsonl"),
        (LINES, "tokens", "jsonl"),
        (b"plain words\n" * 50, "jsonl", "text"),
        (b"plain words\n" * 50, "tokens", "text"),
        (npy(np.arange(200)), "text", "tokens"),
        (npy(np.arange(200)), "jsonl", "tokens"),
    ],
)
def test_the_kind_that_fits_is_named_and_works(tmp_path: Path, content: bytes, kind: str, fits: str) -> None:
    (tmp_path / "corpus").write_bytes(content)
    _, advice = refusal(kind, tmp_path / "corpus")
    assert f"set kind: {fits}" in advice
    keys = {"data__validation_fraction": 0.0}
    prepared(tmp_path / "cache", config({"name": "s", "kind": fits, "path": str(tmp_path / "corpus")}, **keys))


def test_token_files_that_are_none_are_refused_in_our_words(tmp_path: Path) -> None:
    """numpy's message would name `allow_pickle`, which loads code."""
    good = npy(np.arange(300))
    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    contents = (b"", b"no array", npz(), LINES, good[:200], b"\x93NUMPY\x01\x00", objects.getvalue())
    for content in contents:
        (tmp_path / "x.npy").write_bytes(content)
        said = "\n".join(refusal("tokens", tmp_path / "x.npy"))
        assert "x.npy" in said
        assert not any(word in said for word in ("allow_pickle", "mmap", "reshape", "EOF"))


def test_json_lines_under_text_are_warned_about_when_they_may_be_meant(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "text", documents=4)
    jsonl(folder / "x.jsonl")
    (said,) = warnings(Source(name="s", path=str(folder)))
    assert said.startswith("warning: 1 of 5 files are JSON Lines, and are read as they stand: x.jsonl; ")
    assert "kind: jsonl" in said
    logs = tmp_path / "logs.jsonl"
    logs.write_text('{"event": "a"}\n{"event": "b"}\n' * 40)
    assert len(warnings(Source(name="s", path=str(logs)))) == 1
    prepared(tmp_path / "cache", config({"name": "s", "path": str(logs)}, data__validation_fraction=0.0))


def test_a_folder_of_source_code_is_text(tmp_path: Path) -> None:
    """Whatever a repository holds: JSON of all shapes, notebooks, old encodings, odd control characters."""
    for name, content in {
        "a.py": b"# -*- coding: latin-1 -*-\nname = 'Gr\xfc\xdfe'\n" * 9,
        "min.json": b'{"name": "x", "text": 3}',
        "package.json": b'{\n "name": "x"\n}\n',
        "list.json": b'[{"a": 1},\n {"a": 2}]\n',
        "nb.ipynb": b'{\n "cells": [],\n "text": "x"\n}\n',
        "template.html": b"{{ name }}\n{% if x %}\n",
        "code.c": b"{ return 0; }\n{ return 1; }\n\x0c\n",
        "colours.sh": b"echo -e '\x1b[1m bold'\n",
        "BZh.txt": b"BZh9 begins a text",
        "empty.py": b"",
        "cut.txt": b"a" * ((64 << 10) - 1) + "世".encode(),
    }.items():
        (tmp_path / name).write_bytes(content)
    assert warnings(Source(name="s", path=str(tmp_path))) == []
    assert warnings(Source(name="s", path="python:stdlib")) == []


def test_json_that_is_no_json_lines_is_told_from_it() -> None:
    assert content_of("a", b'{"text": "a"}\n{"text": "b"}\n{"te', "text") != "JSON Lines with the field"
    assert content_of("a", b'{"text": "a"}\n{"text": "b"}\n', "text") == "JSON Lines with the field"
    assert content_of("a", b'{"text": "a"}\n{"text": "b"}\n', "body") == "JSON Lines"
    assert content_of("a.json", b'{"body": "a"}', "text") == "JSON"
    assert content_of("a.jsonl", b'{"body": "a"}', "text") == "JSON Lines"
    assert content_of("a.jsonl", b'{"body": "' + b"a" * (64 << 10), "text") == "JSON Lines"
    assert content_of("a", b'[\n{"text": "a"},\n{"text": "b"}]\n', "text") == "a JSON array"


def test_an_array_of_json_under_jsonl_says_how_to_turn_it(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    said, advice = refusal("jsonl", tmp_path / "x.json")
    assert "x.json (a JSON array)" in said
    assert "jq -c '.[]'" in advice


def test_looking_into_files_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config({"name": "s", "path": str(text_folder(tmp_path / "text"))})
    prepared(tmp_path / "cache", cfg)
    monkeypatch.setattr("trainer.data.prepare.check_content", lambda *args: pytest.fail("looked again"))
    prepare(cfg, tmp_path / "cache", lambda line: None, lambda: False)
