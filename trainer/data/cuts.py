"""Where a long text may be cut, so that the ids of its pieces equal the ids of the whole text.

A pattern describes the places. Its group is left out: one piece ends where the group begins, the next one begins where
the group ends. A text is cut only for a tokenizer whose every part is known here. Any other tokenizer gets the whole
text: slower, never wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

PIECE_BYTES = 128 << 10  # a piece is at least this long; small, so that a stop request is noticed soon

ANYWHERE = re.compile(rb"()")
NOWHERE = re.compile(rb"(?!)()")

# In UTF-8: Latin, Cyrillic and Hangul letters, Chinese characters. All are old characters, so every library knows them.
_LETTER = rb"[A-Za-z]|\xd0[\x90-\xbf]|\xd1[\x80-\x8f]|[\xeb\xec][\x80-\xbf]{2}"
_LETTER_OR_DIGIT = _LETTER + rb"|[0-9]|[\xe5-\xe8][\x80-\xbf]{2}"
_VISIBLE = _LETTER_OR_DIGIT + rb"|[!-~]|\xe3\x80[\x81\x82]|\xef\xbc[\x81-\xbf]"
_BEFORE_BLANK = b"(?:%b)()(?= (?:%b))" % (_LETTER, _LETTER)
_AT_BLANK = b"(?:%b)( )(?=(?:%b))" % (_LETTER, _LETTER)  # a dummy prefix replaces the blank that is left out
_AFTER_LINE = b"(?:%b)\n()(?=%b)" % (_VISIBLE, _LETTER_OR_DIGIT)
_LONGEST_PLACE_BYTES = 7

Kinds = frozenset[str]  # kinds of places: "blank", between two words; "line", after the end of a line
_BOTH, _BLANK, _NONE = Kinds({"blank", "line"}), Kinds({"blank"}), Kinds()

_NORMALIZERS = {
    **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"), _BOTH),
    "BertNormalizer": _BLANK,  # it turns the end of a line into a blank
}
_SPLIT_AT_BLANKS = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}

# The alternatives in the patterns of GPT-2, GPT-4, GPT-4o, Llama 3, Qwen and Mistral. None of them matches across a
# place. Two of them look ahead to `(?!\S)`, which holds at a place just as at the end of a text.
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_ALTERNATIVES = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _ENDING),
    *(r" ?\p{L}+", r" ?\p{N}+", r"\p{N}", r"\p{N}{1,3}", r"[^\r\n\p{L}\p{N}]?\p{L}+"),
    *(*_CASED, *(cased + _ENDING + "?" for cased in _CASED)),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    *(r"\s*[\r\n]+", r"\s+(?!\S)"),
}


def pieces(chunks: Iterable[bytes], places: re.Pattern[bytes]) -> Iterator[bytes]:
    """Cut a text, which comes in any chunks, into pieces. A piece ends at the first place after `PIECE_BYTES`."""
    rest, looked = bytearray(), PIECE_BYTES
    for chunk in chunks:
        rest += chunk
        while len(rest) > looked:
            found = places.search(rest, looked)
            if found is None:
                # A place may begin in the last bytes of this chunk and end in the next chunk.
                looked = max(PIECE_BYTES, len(rest) - _LONGEST_PLACE_BYTES)
                break
            end, begin = found.span(found.lastindex or 0)
            yield bytes(rest[:end])
            del rest[:begin], found
            looked = PIECE_BYTES
    if rest:
        yield bytes(rest)


def places_of(spec: dict[str, Any]) -> re.Pattern[bytes]:
    """The places where texts may be cut for the tokenizer of a `tokenizer.json`."""
    normalizers = _flat(spec.get("normalizer"), "normalizers")
    steps = _flat(spec.get("pre_tokenizer"), "pretokenizers")
    marked = any(map(_marks_a_blank, normalizers))
    prefixed = marked and normalizers[0] == {"type": "Prepend", "prepend": "▁"}  # a dummy prefix, as in Llama 2
    if marked:  # no blank is left then, so a step that looks for one finds none (Gemma)
        steps = [step for step in steps if step.get("pattern") != {"String": " "}]
    kinds = _added(spec.get("added_tokens") or [], prefixed)
    for step in normalizers[1:] if prefixed else normalizers:
        kinds &= _BLANK if _marks_a_blank(step) else _NORMALIZERS.get(step["type"], _NONE)
    for step in steps:
        kinds &= _pre_tokenizer(step)
    # These two replace blanks by other characters, so a later step does not see where blanks were.
    if any(step["type"] in ("ByteLevel", "Metaspace") for step in steps[:-1]) or (
        marked and any(step["type"] != "Metaspace" for step in steps)
    ):
        return NOWHERE
    if not any(map(_splits, steps)):
        # The model gets the text as one word, so it must have no token that reaches across a place.
        marked = marked or any(step["type"] == "Metaspace" for step in steps)
        kinds &= _BLANK if marked and _joins_no_words(spec["model"]) else _NONE
    patterns = [_AT_BLANK if prefixed else _BEFORE_BLANK] * ("blank" in kinds) + [_AFTER_LINE] * ("line" in kinds)
    return re.compile(b"|".join(patterns)) if patterns else NOWHERE


def _flat(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [inner for part in step[key] for inner in _flat(part, key)] if step["type"] == "Sequence" else [step]


def _marks_a_blank(step: dict[str, Any]) -> bool:
    return step == {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def _pre_tokenizer(step: dict[str, Any]) -> Kinds:
    """The kinds of places where this step splits the pieces of a text as it splits the whole, blanks kept in both."""
    kind = step["type"]
    if kind == "ByteLevel":
        return _BLANK if step["add_prefix_space"] else _BOTH
    if kind == "Metaspace":
        return _BLANK if step["replacement"] == "▁" else _NONE
    if kind == "Split":
        return _BOTH if _splits(step) else _NONE
    if kind == "Punctuation":
        return _BOTH if step.get("behavior", "Isolated") in ("Isolated", "Contiguous") else _NONE
    return _BOTH if kind == "Digits" or kind in _SPLIT_AT_BLANKS else _NONE


def _splits(step: dict[str, Any]) -> bool:
    """Whether a step puts the two sides of every place into different words."""
    kind = step["type"]
    if kind in ("ByteLevel", "Metaspace"):
        return bool(step.get("use_regex", True) if kind == "ByteLevel" else step.get("split", True))
    if kind == "Split":
        way = (step["behavior"], step["invert"])
        pattern = step["pattern"].get("Regex", "")
        return way in (("Isolated", False), ("Removed", True)) and _is_known(pattern)
    return kind in _SPLIT_AT_BLANKS


def _is_known(pattern: str) -> bool:
    """Whether a pattern consists of known alternatives, and also matches the blanks that they leave."""
    alternatives = re.split(r"\|(?![^(]*\))", pattern)
    return alternatives[-1] == r"\s+" and _ALTERNATIVES.issuperset(alternatives[:-1])


def _added(tokens: list[dict[str, Any]], prefixed: bool) -> Kinds:
    """The kinds of places that no added token reaches across. Added tokens are found before the text is split."""
    kinds = _BOTH
    for token in tokens:
        content = token["content"].replace("▁", " ")
        reaches = not token["special"]  # special tokens are never found in a document, so they take no blanks either
        if re.search(r"\S\s", content) or (reaches and token["rstrip"]):
            kinds -= _BLANK
        if re.search(r"\s\S", content) or (reaches and token["lstrip"]):
            kinds -= {"line"}
        if reaches and token["single_word"] and content != content.strip():
            return _NONE
        if prefixed and reaches and (content[:1].isspace() or content[:1].isalnum()):
            return _NONE
    return kinds


def _joins_no_words(model: dict[str, Any]) -> bool:
    """Whether no token of a BPE has a blank after another character. Then merges stay on their side of a place."""
    affixes = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"), model.get("ignore_merges"))
    vocabulary = model.get("vocab", {})
    if model["type"] != "BPE" or any(affixes) or "▁" not in vocabulary:
        return False
    return not any(re.search("[^▁]▁", token) for token in vocabulary)
