"""Tokenizers: decoding gives the encoded text, and no document can write a special token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import bpe, config
from tokenizers import Tokenizer, models, pre_tokenizers

from configs.errors import UserError
from trainer.data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer

ANY = {"name": "x", "path": "unused"}


@given(st.binary(max_size=200))
def test_bytes_are_their_own_ids(content: bytes) -> None:
    (ids,) = ByteTokenizer().encode([content])
    assert ids.tolist() == list(content)
    assert ByteTokenizer().decode([*ids.tolist(), 256]) == content.decode("utf-8", errors="replace")


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(scope="module")
def loaded(bpe_path: Path) -> JsonTokenizer:
    return JsonTokenizer(bpe_path, None)


@given(parts=st.lists(st.one_of(st.text(max_size=30), st.just("<|endoftext|>")), max_size=6))
def test_special_strings_in_documents_stay_text(loaded: JsonTokenizer, parts: list[str]) -> None:
    document = "".join(parts)
    (ids,) = loaded.encode([document.encode()])
    assert loaded.end_token not in ids
    assert loaded.decode(ids.tolist()) == document


def test_special_strings_take_the_ordinary_way(loaded: JsonTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only vocabularies that need it are cut: elsewhere a cut could change the ids around the string."""
    monkeypatch.delattr(JsonTokenizer, "_encode_cut")
    (ids,) = loaded.encode([b"a <|endoftext|> b"])
    assert loaded.decode(ids.tolist()) == "a <|endoftext|> b"


def test_truncation_and_padding_of_the_file_are_switched_off(loaded: JsonTokenizer) -> None:
    long, short = loaded.encode([b"the model learns from text " * 50, b"a"])
    assert len(long) > 100
    assert len(short) == 1


def test_special_strings_that_are_also_ordinary_vocabulary(tmp_path: Path) -> None:
    """A word-level (or Unigram) model finds `</s>` in its own vocabulary, despite the library's switch."""
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2, "<": 3, "/s>": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.save(str(tmp_path / "t.json"))
    tokenizer = JsonTokenizer(tmp_path / "t.json", None)
    assert [ids.tolist() for ids in tokenizer.encode([b"a </s> a </s>", b"a"])] == [[1, 3, 4, 1, 3, 4], [1]]


def test_broken_utf8_is_replaced(loaded: JsonTokenizer) -> None:
    (ids,) = loaded.encode([b"ok \xff\xfe ok"])
    assert loaded.decode(ids.tolist()) == "ok \ufffd\ufffd ok"


@pytest.mark.parametrize(
    ("vocabulary", "asked", "found"),
    [
        (["</s>", "<|endoftext|>"], None, "<|endoftext|>"),
        (["</s>", "<|end_of_text|>"], None, "<|end_of_text|>"),
        (["</s>"], None, "</s>"),
        (["</s>", "EOS"], "EOS", "EOS"),
    ],
)
def test_end_token(tmp_path: Path, vocabulary: list[str], asked: str | None, found: str) -> None:
    Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="x")).save(str(tmp_path / "t.json"))
    assert JsonTokenizer(tmp_path / "t.json", asked).end_token == vocabulary.index(found)


def test_mistakes_are_user_errors(tmp_path: Path, bpe_path: Path) -> None:
    no_end, broken = tmp_path / "no_end.json", tmp_path / "broken.json"
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(no_end))
    broken.write_text("{}")
    cases = [
        ({"data__tokenizer": str(tmp_path / "none.json")}, r"cannot read .*none.json"),
        ({"data__tokenizer": str(broken)}, "is not a tokenizer.json"),
        ({"data__tokenizer": str(no_end)}, r"<\|end_of_text\|>, <\|endoftext\|>, </s>"),
        ({"data__tokenizer": str(bpe_path), "data__end_token": "<eos>"}, "'<eos>' is not in the vocabulary"),
        ({"data__end_token": "x"}, "no meaning with data.tokenizer=bytes"),
        ({"model__vocab_size": 256}, "token ids beyond the vocabulary.*256"),
        ({"data__tokenizer": str(bpe_path), "model__vocab_size": 100}, "token ids beyond the vocabulary"),
    ]
    for keys, message in cases:
        cfg = config(ANY, **keys)
        with pytest.raises(UserError, match=message):
            load_tokenizer(cfg.data, cfg.model.vocab_size)


def test_fingerprint_is_of_content_and_end_token(tmp_path: Path, bpe_path: Path, loaded: JsonTokenizer) -> None:
    copy = tmp_path / "copy.json"
    copy.write_bytes(bpe_path.read_bytes())
    assert JsonTokenizer(copy, None).fingerprint == loaded.fingerprint
    assert JsonTokenizer(copy, "a").fingerprint != loaded.fingerprint
    copy.write_bytes(bpe_path.read_bytes() + b"\n")
    assert JsonTokenizer(copy, None).fingerprint != loaded.fingerprint


def test_ids_are_integers_even_of_nothing(loaded: JsonTokenizer) -> None:
    assert all(ids.dtype.kind in "iu" and isinstance(ids, np.ndarray) for ids in loaded.encode([b"", b"a"]))
