"""Documents of each kind of source, and the errors for bad ones."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema.data import Source
from trainer.data import sources
from trainer.data.listing import list_files
from trainer.data.sources import FileReading, read_file


def names(source: Source) -> list[str]:
    return [name for name, _ in list_files(source, lambda: None)]


def documents(
    source: Source, vocab_size: int = 300, end_token: int = 256
) -> tuple[list[bytes | list[int]], FileReading]:
    reading, found = FileReading(), []
    for _, path in list_files(source, lambda: None):
        for document in read_file(source, path, end_token, vocab_size, reading):
            chunks = list(document.chunks)
            found.append(b"".join(chunks) if isinstance(chunks[0], bytes) else np.concatenate(chunks).tolist())
    return found, reading


def touch(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(file)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/*", ["a.py", "b.txt", "sub/a/c.py", "sub/d.py", "sub/e[1].py"]),
        ("**/*.py", ["a.py", "sub/a/c.py", "sub/d.py", "sub/e[1].py"]),
        ("*.py", ["a.py"]),
        ("sub/*", ["sub/d.py", "sub/e[1].py"]),
        ("sub/**", ["sub/a/c.py", "sub/d.py", "sub/e[1].py"]),
        ("**/[!ab].py", ["sub/a/c.py", "sub/d.py"]),
        ("**/?.[pt]*", ["a.py", "b.txt", "sub/a/c.py", "sub/d.py"]),
        ("sub/e[[]1].py", ["sub/e[1].py"]),
    ],
)
def test_pattern(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    touch(tmp_path, "a.py", "b.txt", "sub/d.py", "sub/a/c.py", "sub/e[1].py", ".git/x.py", "sub/.hidden.py")
    assert names(Source(name="s", path=str(tmp_path), pattern=pattern)) == expected


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "x.txt")
    touch(tmp_path / "corpus", "a.txt")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "corpus")
    assert names(Source(name="s", path=str(tmp_path / "corpus"))) == ["a.txt", "linked/x.txt"]


def test_stdlib_is_python_source_without_tests_and_site_packages() -> None:
    found = names(Source(name="s", path="python:stdlib"))
    assert {"os.py", "json/decoder.py"} <= set(found)
    assert all(name.endswith(".py") for name in found)
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not any(left_out & set(name.split("/")) for name in found)


def test_text_skips_and_counts_empty_files_and_keeps_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "b").write_bytes(b"\xff\x00 raw")
    found, reading = documents(Source(name="s", path=str(tmp_path)))
    assert found == [b"\xff\x00 raw"]
    assert (reading.empty_documents, reading.replaced_documents) == (1, 1)


def test_a_large_file_gives_the_same_document_as_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"line of text\n  indented\n" * 20_000 + b"\xff" + "世".encode() * 500_000)
    source = Source(name="s", path=str(tmp_path))

    def read() -> tuple[bytes, bytes, str, int]:
        reading, found = FileReading(), []
        for document in read_file(source, tmp_path / "a", 256, 300, reading):
            found.append((document.digest, b"".join(document.chunks)))
        ((digest, content),) = found
        return digest, content, reading.digest, reading.replaced_documents

    at_once = read()
    monkeypatch.setattr(sources, "_WHOLE_BYTES", 1000)
    assert read() == at_once
    assert at_once[1] == (tmp_path / "a").read_bytes()
    assert at_once[3] == 1


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": "Grüße", "n": 1}), "", json.dumps({"text": ""}), '{"text": "\\ud800x"}']
    # We must not refuse what Python's json writes, and what other fields hold: a NaN, or a key twice further inside.
    lines.append('{"text": "as is?", "score": NaN, "limit": -Infinity, "meta": {"a": 1, "a": 2}}')
    file.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    found, reading = documents(Source(name="s", kind="jsonl", path=str(file)))
    assert found == ["Grüße".encode(), b"?x", b"as is?"]
    assert (reading.empty_documents, reading.replaced_documents) == (1, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', "not a line of JSON"),
        (b'{"text": "\xff"}', "not a line of JSON"),
        (b"[" * 100_000, "not a line of JSON"),
        (b'["text"]', "an object was expected, not a list"),
        (b'{"body": "x", "id": 3}', "no key 'text'.*its keys: body, id"),
        (b'{"text": 3}', "'text' is a number, a string was expected"),
        (b'{"text": null}', "'text' is null, a string was expected"),
        (b'{"text": [], "n": NaN}', "'text' is a list, a string was expected"),
        (b'{"text": "a", "id": 1, "text": "b"}', "the key 'text' stands twice"),
        (b'{"id": 1, "text": "a", "id": 1}', "the key 'id' stands twice"),
    ],
)
def test_bad_jsonl_lines_are_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as e:
        documents(Source(name="s", kind="jsonl", path=str(file)))
    assert str(e.value).startswith(f"{file}:3: ")
    assert len(str(e.value).splitlines()) <= 2


def test_a_line_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array on one line, or a file of another kind, would be read into memory whole."""
    monkeypatch.setattr(sources, "_LINE_BYTES", 1 << 20)
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "' + b"a" * (1 << 20))
    with pytest.raises(UserError, match=r"x\.jsonl:2: a line of more than 1 MiB"):
        documents(Source(name="s", kind="jsonl", path=str(tmp_path)))


@given(
    docs=st.lists(st.lists(st.integers(0, 255), max_size=9), max_size=8),
    chunk=st.integers(1, 7),
    dtype=st.sampled_from(["<u2", ">i4", "<i8", "<u8"]),
)
def test_tokens_are_cut_at_the_end_token_whatever_the_chunks(docs: list[list[int]], chunk: int, dtype: str) -> None:
    flat = [t for doc in docs for t in [*doc, 256]]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        patch.setattr(sources, "_CHUNK_TOKENS", chunk)
        folder = Path(name)
        np.save(folder / "x.npy", np.array(flat, dtype=dtype))
        found, reading = documents(Source(name="s", kind="tokens", path=str(folder / "x.npy")))
    assert found == [doc for doc in docs if doc]
    assert reading.empty_documents == sum(not doc for doc in docs) + (not docs)  # an empty file counts as one
    assert reading.end_tokens == len(docs)


def test_the_same_tokens_in_another_width_are_the_same_document(tmp_path: Path) -> None:
    digests = set()
    for dtype in ("<u2", ">i8"):
        np.save(tmp_path / "x.npy", np.array([1, 2, 3], dtype=dtype))
        source = Source(name="s", kind="tokens", path=str(tmp_path))
        (document,) = read_file(source, tmp_path / "x.npy", 256, 300, FileReading())
        digests.add(document.digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1, 2, 300, 4]), "token id 300 at position 2 is beyond"),
        (np.array([1, -1]), "token id -1 at position 1 is beyond"),
        (np.array([[1, 2]]), "one-dimensional array of integers"),
        (np.array([1.0]), "one-dimensional array of integers"),
        (np.array([{}]), "is not a \\.npy file of token ids"),
    ],
)
def test_bad_token_files(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(UserError, match=message) as e:
        documents(Source(name="s", kind="tokens", path=str(tmp_path)))
    assert str(tmp_path / "x.npy") in str(e.value)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00", b"PK\x05\x06" + bytes(18)])
def test_files_that_are_no_arrays(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(UserError, match=r"is not a \.npy file of token ids"):
        documents(Source(name="s", kind="tokens", path=str(tmp_path)))


def test_missing_and_unreadable_places_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data source 's': .*nowhere does not exist"):
        names(Source(name="s", path=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="data source 's' is empty: no file in"):
        names(Source(name="s", path=str(tmp_path)))
    with pytest.raises(UserError, match="is not a pattern"):
        names(Source(name="s", path=str(tmp_path), pattern="[z-a]"))
    with pytest.raises(UserError, match="set its kind to text"):
        names(Source(name="s", kind="jsonl", path="python:stdlib"))
    gone = tmp_path / "gone"
    touch(tmp_path, "gone")
    ((_, path),) = list_files(Source(name="s", path=str(tmp_path)), lambda: None)
    os.unlink(gone)
    with pytest.raises(UserError, match=r"cannot read .*gone: No such file"):
        list(read_file(Source(name="s", path=str(tmp_path)), path, 256, 300, FileReading()))
