"""The head and its loss: cross-entropy that never holds the logits of a whole batch.

Logits of 8,192 tokens over 128,256 words are 4 GiB in fp32, and so is their gradient. Here both exist for
`chunk_tokens` tokens at a time. A chunk's softmax gives its gradient, so the forward pass computes both. Backward then
neither keeps logits nor computes them again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = -100  # the target of a token that is not predicted


class LossSums(NamedTuple):
    """Sums over the targets of a batch, fp32 scalars. They are no means: the divisor is the count over all ranks."""

    total: Tensor  # cross-entropy + z_loss * logsumexp^2; differentiable
    loss: Tensor  # cross-entropy alone; detached


@dataclass(frozen=True)
class VocabularyPart:
    """This rank's rows of the weight: the words `first`, `first` + 1, ... of `vocab_size` words over several ranks.

    The functions reduce a tensor over those ranks, in place or not. All those ranks make the same calls.
    """

    first: int
    vocab_size: int
    all_max: Callable[[Tensor], Tensor]
    all_sum: Callable[[Tensor], Tensor]

    def find(self, words: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """(row on this rank, or 0 if the word is not here; whether it is here). For a word outside the vocabulary, the
        rank at the nearest end says "here": looking the word up there fails as it does without parts."""
        here = torch.ones_like(words, dtype=torch.bool)
        if self.first > 0:
            here &= words >= self.first
        if self.first + rows < self.vocab_size:
            here &= words < self.first + rows
        return torch.where(here, words - self.first, 0), here


class Head(nn.Module):
    """The projection onto the vocabulary, and the loss on it."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size, dim))

    def forward(self, hidden: Tensor, targets: Tensor | None, z_loss: float, chunk_tokens: int) -> Tensor | LossSums:
        """hidden (B, T, dim) -> logits (B, T, V) in its dtype, or with targets (B, T) the sums over them."""
        if targets is None:
            return F.linear(hidden, self.weight)
        return chunked_cross_entropy(hidden, self.weight, targets, z_loss, chunk_tokens)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    chunk_tokens: int = 1024,
    part: VocabularyPart | None = None,
) -> LossSums:
    """Cross-entropy of hidden @ weight.T, summed over the targets, with at most chunk_tokens x V logits at a time.

    hidden (..., dim); weight (V, dim); targets (...) int64: IGNORE where a token has none, otherwise below V. Another
    value raises IndexError on the CPU. Gradients reach hidden and weight, once: a second derivative raises
    RuntimeError.

    With `part`, weight (rows, dim) holds some of the words. Every rank gets the sums over all words. The gradient of
    hidden is only this rank's term of a sum over the ranks.
    """
    sums = _ChunkedCrossEntropy.apply(
        hidden.flatten(0, -2), weight, targets.flatten(), z_loss, chunk_tokens, part, torch.is_grad_enabled()
    )
    return LossSums(*sums)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        chunk_tokens: int,
        part: VocabularyPart | None,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        """hidden (N, dim), targets (N,) -> (total, loss). The gradients of total are kept in ctx."""
        exact = torch.promote_types(hidden.dtype, torch.float32)  # of softmax, sums and the weight's gradient
        grad_hidden = torch.empty_like(hidden) if grad_enabled and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if grad_enabled and ctx.needs_input_grad[1] else None
        counts = (targets != IGNORE)[:, None]
        words = torch.where(counts, targets[:, None], 0)  # clamp would turn any negative target into word 0
        ones = hits = counts.to(exact)
        if part is not None:
            words, here = part.find(words, len(weight))
            hits = ones * here
        losses, log_partitions = torch.empty_like(ones), torch.empty_like(ones)

        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            # One buffer holds the logits, then in place their exponentials, then their gradient.
            logits = (hidden[chunk] @ weight.T).to(exact)
            top = logits.amax(dim=1, keepdim=True)
            top = top if part is None else part.all_max(top)
            target_logits = logits.sub_(top).gather(1, words[chunk])
            norm = logits.exp_().sum(dim=1, keepdim=True)
            if part is not None:
                mine = torch.where(here[chunk], target_logits, 0)
                target_logits, norm = part.all_sum(torch.cat((mine, norm), dim=1)).split(1, dim=1)
            log_norm = norm.log()
            losses[chunk] = log_norm - target_logits  # both relative to top, else a sure token would lose digits
            log_partitions[chunk] = log_norm + top
            if grad_hidden is None and grad_weight is None:
                continue
            scale = ones[chunk] / norm
            if z_loss:
                scale *= 1 + 2 * z_loss * log_partitions[chunk]
            grad_logits = logits.mul_(scale).scatter_add_(1, words[chunk], -hits[chunk]).to(hidden.dtype)
            del logits
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None and exact == hidden.dtype:
                grad_weight.addmm_(grad_logits.T, hidden[chunk])
            elif grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[chunk]

        loss = torch.where(counts, losses, 0).sum()
        total = loss + z_loss * torch.where(counts, log_partitions.square(), 0).sum() if z_loss else loss.clone()
        ctx.mark_non_differentiable(loss)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total, loss

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; `once_differentiable` would let a constant pass silently
            raise RuntimeError("the chunked cross-entropy has no second derivative")
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype = None if grad_hidden is None else grad_hidden.dtype
        grads = _scaled(grad_hidden, grad_total, hidden_dtype), _scaled(grad_weight, grad_total, ctx.weight_dtype)
        return *grads, None, None, None, None, None


def _scaled(grad: Tensor | None, scale: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """grad * scale in dtype, without a second copy in between.

    The scale (1 / target tokens) gets two dimensions. A bare scalar would be converted to grad's own dtype. On a GPU it
    would be rounded to bf16: every gradient would be up to 0.4 % too large or too small.
    """
    if grad is None:
        return None
    return torch.mul(grad, scale.view(1, 1), out=torch.empty_like(grad, dtype=dtype))
