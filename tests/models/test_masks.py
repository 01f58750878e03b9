"""Masks and packed rows: a document gives the same in a row with others as alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import Decoder
from models.masks import attention_mask, document_starts

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "rope": {},
    "rope and window": {"sliding_window": 5},
    "learned": {"position": "learned"},
    "learned and window": {"position": "learned", "sliding_window": 5},
    "one head each": {"kv_heads": None, "qk_norm": True},
}
rows = st.lists(st.integers(0, 3), min_size=1, max_size=24)


@settings(max_examples=100)
@given(row=rows, window=st.none() | st.integers(1, 30))
def test_the_mask_says_what_the_words_say(row: list[int], window: int | None) -> None:
    """A token sees itself and earlier tokens, within the window, without a change of document in between."""
    starts = document_starts(torch.tensor([row]))
    mask = attention_mask(len(row), starts, window, CPU)
    assert mask is not None
    for query in range(len(row)):
        for key in range(len(row)):
            sees = key <= query and len(set(row[key : query + 1])) == 1 and (window is None or query - key < window)
            assert mask[0, 0, query, key].item() == sees


def test_documents_are_found_in_each_row() -> None:
    documents = torch.tensor([[7, 7, 2, 2, 2, 7], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    assert document_starts(documents).tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6]


@pytest.mark.parametrize(("window", "wanted"), [(None, False), (8, False), (9, False), (7, True), (1, True)])
def test_there_is_a_mask_only_where_it_hides_something(window: int | None, wanted: bool) -> None:
    assert (attention_mask(8, None, window, CPU) is not None) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_gives_what_its_documents_give_alone(kind: str, build: Callable[..., Decoder]) -> None:
    """Logits (up to 10 here) agree to 1e-5; losses, and gradients of their sum, to 1e-5 of the value."""
    model = build(**KINDS[kind]).eval()
    lengths = [[9, 1, 14, 8], [20, 12]]
    tokens, targets = torch.randint(0, 97, (2, 2, 32), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])

    packed = model(tokens, documents=documents)
    total = model(tokens, documents=documents, targets=targets, chunk_tokens=7).total
    grads = torch.autograd.grad(total, list(model.parameters()))
    alone_total = torch.zeros(())
    for row, row_lengths in enumerate(lengths):
        begin = 0
        for length in row_lengths:
            part = slice(begin, begin + length)
            alone = model(tokens[row : row + 1, part])
            torch.testing.assert_close(packed[row, part], alone[0], rtol=0, atol=1e-5)
            alone_total = alone_total + model(tokens[row : row + 1, part], targets=targets[row : row + 1, part]).total
            begin += length
    torch.testing.assert_close(total, alone_total, rtol=1e-5, atol=0)
    alone_grads = torch.autograd.grad(alone_total, list(model.parameters()))
    for ours, theirs in zip(grads, alone_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_the_future(kind: str, build: Callable[..., Decoder]) -> None:
    model = build(**KINDS[kind]).eval()
    tokens = torch.randint(0, 97, (1, 20), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 12:] = (tokens[0, 12:] + 1) % 97
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :12], before[:, :12], rtol=0, atol=1e-6)
    assert not torch.allclose(after[:, 12], before[:, 12], atol=1e-3)
