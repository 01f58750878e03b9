"""Text to token ids and back: plain bytes, or a `tokenizer.json` through the `tokenizers` library."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from configs.config import Config
from configs.errors import UserError
from configs.schema.data import DataSection
from trainer.data.cuts import ANYWHERE, places_of

USUAL_END_TOKENS = ("<|end_of_text|>", "<|endoftext|>", "</s>")


class Tokenizer(Protocol):
    """What the rest of the data code needs. `size`: the largest id plus one. `end_token` ends every document. `places`:
    where a long text may be cut (`cuts.py`)."""

    size: int
    end_token: int
    fingerprint: str
    places: re.Pattern[bytes]

    def encode(self, texts: list[bytes]) -> list[np.ndarray]:
        """One 1-D integer array of ids for each piece of text, without any special token."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids for a person: without special tokens, with broken UTF-8 replaced."""


class ByteTokenizer:
    """Each byte is a token; 256 ends a document. Any bytes are accepted, valid UTF-8 or not."""

    size = 257
    end_token = 256
    fingerprint = "bytes"
    places = ANYWHERE

    def encode(self, texts: list[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class NoTokenizer:
    """For sources that hold ids already. It knows only the id that ends a document."""

    fingerprint = "ids"
    places = ANYWHERE

    def __init__(self, end_token: int) -> None:
        self.end_token = end_token
        self.size = end_token + 1

    def encode(self, texts: list[bytes]) -> list[np.ndarray]:
        if texts:
            raise TypeError("there is no tokenizer, and the config was let through with text")
        return []

    def decode(self, ids: list[int]) -> str:
        raise TypeError("there is no tokenizer, and the config was let through with text to write")


class JsonTokenizer:
    """A `tokenizer.json`. Strings in a document that look like special tokens remain ordinary text."""

    def __init__(self, path: Path, end_token: str | None) -> None:
        # Imported late: the library takes a while to import, and most commands never tokenise.
        import tokenizers

        content = _read(path)
        try:
            spec = json.loads(content)
            self._inner: Any = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as e:  # the library raises bare Exception for any mistake in the file
            raise UserError(f"data.tokenizer: {path} is not a tokenizer.json: {e}") from e
        # A file may ask for truncation or padding (many published ones do). Both would silently spoil documents.
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        if getattr(self._inner.model, "dropout", None) is not None:
            self._inner.model.dropout = None  # it would draw other ids each time
        self.places = places_of(spec)
        vocabulary: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1
        name = _end_token(path, vocabulary, end_token)
        self.end_token = vocabulary[name]
        special = {t["content"]: int(t["id"]) for t in spec.get("added_tokens", []) if t.get("special")}
        special[name] = self.end_token
        self._special_ids = np.array(sorted(special.values()))
        self._special_text = re.compile("|".join(re.escape(s) for s in sorted(special, key=len, reverse=True)))
        self.fingerprint = hashlib.blake2b(content + b"\0" + name.encode(), digest_size=16).hexdigest()

    def encode(self, texts: list[bytes]) -> list[np.ndarray]:
        strings = [text.decode("utf-8", errors="replace") for text in texts]
        found = self._inner.encode_batch_fast(strings, add_special_tokens=False)
        arrays = [np.array(e.ids, dtype=np.int64) for e in found]
        return [
            self._encode_cut(s) if np.isin(ids, self._special_ids).any() else ids
            for s, ids in zip(strings, arrays, strict=True)
        ]

    def decode(self, ids: list[int]) -> str:
        return str(self._inner.decode(ids, skip_special_tokens=True))

    def _encode_cut(self, text: str) -> np.ndarray:
        """Encode a text that holds strings like special tokens, by cutting inside those strings.

        `encode_special_tokens` only stops the matcher of added tokens. A Unigram or word-level model has `</s>` in its
        own vocabulary too. An added token that is not marked special is matched all the same. Only strings that gave a
        special token are cut, so that a string at one place changes no id at another place.
        """
        whole = self._inner.encode(text, add_special_tokens=False)
        special = np.zeros(len(text) + 1, dtype=bool)
        for (begin, end), is_special in zip(whole.offsets, np.isin(whole.ids, self._special_ids), strict=True):
            special[begin:end] |= is_special
        found = (m for m in self._special_text.finditer(text) if special[m.start() : m.end()].any())
        cuts = [0, *(m.start() + 1 for m in found), len(text)]
        parts = [text[a:b] for a, b in itertools.pairwise(cuts) if b > a]
        ids = [np.array(e.ids, dtype=np.int64) for e in self._inner.encode_batch_fast(parts, add_special_tokens=False)]
        joined = np.concatenate([np.empty(0, np.int64), *ids])
        # Special ids that remain (a one-character special token, an unknown token marked special) end no document.
        return joined[joined != self.end_token]


def words_of(config: Config, tokenizer: Tokenizer) -> int:
    """Rows of the embedding: all token ids are below. The tokenizer decides where the config leaves it out."""
    return config.vocab_size or tokenizer.size


def load_tokenizer(data: DataSection, vocab_size: int) -> Tokenizer:
    """The tokenizer of a config. Raises UserError when it is missing, lacks an end token, or exceeds the model."""
    if data.tokenizer == "bytes":
        if data.end_token is not None:
            raise UserError("data.end_token has no meaning with data.tokenizer=bytes (256 ends a document); remove it")
        tokenizer: Tokenizer = ByteTokenizer()
    elif data.tokenizer == "none":
        end_token = int(data.end_token or "")  # digits, or the config was refused
        if end_token >= vocab_size:
            raise UserError(f"data.end_token {end_token} is beyond the vocabulary: model.vocab_size is {vocab_size}")
        return NoTokenizer(end_token)
    else:
        tokenizer = JsonTokenizer(Path(data.tokenizer), data.end_token)
    if tokenizer.size > vocab_size:
        raise UserError(
            f"token ids beyond the vocabulary: data.tokenizer={data.tokenizer} has ids up to {tokenizer.size - 1}, "
            f"model.vocab_size is {vocab_size}\nset model.vocab_size to at least {tokenizer.size}"
        )
    return tokenizer


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise UserError(
            f"data.tokenizer: cannot read {path}: {e.strerror}\ngive `bytes` or the path of a tokenizer.json"
        ) from e


def _end_token(path: Path, vocabulary: dict[str, int], wanted: str | None) -> str:
    """The token that ends a document: the wanted one, else the first usual one in the vocabulary."""
    if wanted is not None:
        if wanted not in vocabulary:
            raise UserError(f"data.end_token: {wanted!r} is not in the vocabulary of {path}")
        return wanted
    for name in USUAL_END_TOKENS:
        if name in vocabulary:
            return name
    raise UserError(
        f"data.tokenizer: {path} has none of the usual end tokens {', '.join(USUAL_END_TOKENS)}\n"
        "set data.end_token to the token that ends a document"
    )
