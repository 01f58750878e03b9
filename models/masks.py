"""Which tokens a token sees: those before it, in its own document, and inside the sliding window."""

import torch
from torch import Tensor


def document_starts(documents: Tensor) -> Tensor:
    """Index within its row of the first token of each token's document.

    documents (B, T) holds any integer per document. A new document starts wherever the number changes, so the same
    number later in a row is another document. Returns (B, T) int64.
    """
    index = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
    changes = torch.ones_like(documents, dtype=torch.bool)
    changes[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(changes, index, 0).cummax(dim=1).values


def attention_mask(seq_len: int, starts: Tensor | None, window: int | None, device: torch.device) -> Tensor | None:
    """True where a query (row) sees a key (column): (B or 1, 1, T, T), or None when plain causal attention is enough.

    None matters: attention can use its fastest kernels only without a mask.
    """
    if window is not None and window >= seq_len:
        window = None
    if starts is None and window is None:
        return None
    index = torch.arange(seq_len, device=device)
    first = torch.zeros(1, seq_len, dtype=torch.int64, device=device) if starts is None else starts
    if window is not None:
        first = torch.maximum(first, index - (window - 1))
    return ((index >= first[..., None]) & (index <= index[:, None]))[:, None]
