"""Tokens of documents, one after the other, and the samples that are cut from them: windows of equal length."""

from __future__ import annotations

import numpy as np

from models import IGNORE
from trainer.data.samples import Columns


class Split:
    """The tokens of one split of a source. Sample i begins at token i * seq_len; its targets are one token later."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        self.tokens = tokens
        self.starts = starts  # (documents,) int64: where each document begins

    def sample_count(self, seq_len: int) -> int:
        return max(len(self.tokens) - 1, 0) // seq_len

    def write_sample(self, index: int, tokens: np.ndarray, targets: np.ndarray, documents: np.ndarray | None) -> None:
        """Fill one row of a batch; each array is (seq_len,).

        documents counts from 0 at the sample's first token. A target is IGNORE where it is the first token of another
        document. Documents are known from `starts`, never guessed from token values.
        """
        seq_len = len(tokens)
        begin = index * seq_len
        window = self.tokens[begin : begin + seq_len + 1]
        tokens[:] = window[:-1]
        targets[:] = window[1:]
        # Documents that begin inside (begin, begin + seq_len]. The last of these places is only a target.
        first, last = np.searchsorted(self.starts, (begin, begin + seq_len), side="right")
        begins = self.starts[first:last] - begin
        targets[begins - 1] = IGNORE
        if documents is not None:
            documents[:] = 0
            documents[begins[begins < seq_len]] = 1
            np.cumsum(documents, out=documents)


class Windows:
    """The samples of a split: `seq_len` tokens each, and as many targets."""

    def __init__(self, split: Split, seq_len: int, document_mask: bool) -> None:
        self.split, self._seq_len, self._document_mask = split, seq_len, document_mask

    def __len__(self) -> int:
        return self.split.sample_count(self._seq_len)

    def read(self, index: int) -> Columns:
        """`tokens`, `targets` int64 and, where tokens see only their document, `documents` int32: each (seq_len,)."""
        found = {name: np.empty(self._seq_len, np.int64) for name in ("tokens", "targets")}
        documents = np.empty(self._seq_len, np.int32) if self._document_mask else None
        self.split.write_sample(index, found["tokens"], found["targets"], documents)
        return found if documents is None else {**found, "documents": documents}

    def cost(self, index: int) -> int:
        return self._seq_len
