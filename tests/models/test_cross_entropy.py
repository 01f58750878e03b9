"""The chunked loss equals the plain one: same numbers, same gradients, a fraction of the memory."""

import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import IGNORE, LossSums
from models.cross_entropy import Head, VocabularyPart, chunked_cross_entropy


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> LossSums:
    """The loss, computed in the plain way."""
    logits = (hidden @ weight.T).flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")
    penalty = logits.logsumexp(-1)[targets.flatten() != IGNORE].square().sum()
    return LossSums(loss + z_loss * penalty, loss.detach())


def make(
    tokens: int, vocab: int, dim: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, tokens, dim, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (2, tokens), generator=generator)
    targets[torch.rand(2, tokens, generator=generator) < 0.3] = IGNORE
    return hidden, weight, targets


def gradients(loss: Callable[..., LossSums], *args: Any) -> tuple[LossSums, Tensor, Tensor]:
    sums = loss(*args)
    grad_hidden, grad_weight = torch.autograd.grad(sums.total / 7, args[:2])
    return sums, grad_hidden, grad_weight


@settings(max_examples=40)
@given(
    tokens=st.integers(1, 40), vocab=st.integers(2, 60), chunk=st.integers(1, 90), seed=st.integers(0, 10**6),
    z_loss=st.sampled_from([0.0, 1e-4, 0.1]),
)  # fmt: skip
def test_equals_the_plain_loss(tokens: int, vocab: int, chunk: int, seed: int, z_loss: float) -> None:
    """In fp32, to 2e-6 of the value or of the largest gradient (only the order of summation differs)."""
    hidden, weight, targets = make(tokens, vocab, seed=seed)
    expected = gradients(plain, hidden, weight, targets, z_loss)
    got = gradients(chunked_cross_entropy, hidden, weight, targets, z_loss, chunk)
    for ours, theirs in zip((*got[0], *got[1:]), (*expected[0], *expected[1:]), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6 * max(1.0, theirs.abs().max().item()))
    assert not got[0].loss.requires_grad


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradients_in_float64(z_loss: float) -> None:
    hidden, weight, targets = make(5, 11, dim=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets, z_loss, 4).total, (hidden, weight)
    )


def test_bf16_is_as_near_as_the_plain_loss() -> None:
    """Against float64, with the global scale applied: errors at most 1.05 times those of the plain loss in bf16.

    A scale rounded to bf16 would make every gradient 0.2 % smaller (1/7 is no bf16 number): the projection shows it."""
    hidden, weight, targets = make(300, 60, dim=64, dtype=torch.bfloat16)
    exact = gradients(plain, hidden.double(), weight.double(), targets)
    theirs = gradients(plain, hidden, weight, targets)
    ours = gradients(chunked_cross_entropy, hidden, weight, targets, 0.0, 128)
    for mine, other, right in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - right).norm() <= 1.05 * (other - right).norm()
        assert ((mine.double() * right).sum() / right.square().sum()).item() == pytest.approx(1, abs=5e-4)
    assert ours[0].total.dtype == torch.float32


def in_parts(ranks: int, hidden: Tensor, weight: Tensor, targets: Tensor, *args: Any) -> list[tuple[Any, ...]]:
    """(sums, grad_hidden, grad_weight) of each rank with its part of the words. Threads play the ranks."""
    barrier, given = threading.Barrier(ranks, timeout=20), {}
    cuts = weight.detach().split(-(-len(weight) // ranks))

    def reduction(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(mine: Tensor) -> Tensor:
            given[threading.get_ident()] = mine.clone()
            barrier.wait()
            out = reduce(torch.stack(list(given.values())))
            barrier.wait()
            return out

        return call

    def rank(number: int) -> tuple[Any, ...]:
        part = VocabularyPart(number * len(cuts[0]), len(weight), all_max, all_sum)
        mine = (hidden.detach().requires_grad_(), cuts[number].clone().requires_grad_(), targets)
        try:
            return gradients(lambda *given: chunked_cross_entropy(*given, part=part), *mine, *args)
        except Exception:
            barrier.abort()  # the others would wait for this rank
            raise

    all_max, all_sum = reduction(lambda stack: stack.amax(0)), reduction(lambda stack: stack.sum(0))
    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(rank, number) for number in range(ranks)]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]


@settings(max_examples=40)
@given(
    tokens=st.integers(1, 40), vocab=st.integers(6, 60), ranks=st.integers(2, 3), chunk=st.integers(1, 90),
    seed=st.integers(0, 10**6), z_loss=st.sampled_from([0.0, 0.1]),
)  # fmt: skip
def test_parts_of_the_words_give_the_whole_loss(
    tokens: int, vocab: int, ranks: int, chunk: int, seed: int, z_loss: float
) -> None:
    """Every rank has the whole sums. Hidden's gradients add up to the whole one, the weight's are rows of it."""
    hidden, weight, targets = make(tokens, vocab, seed=seed)
    sums, grad_hidden, grad_weight = gradients(plain, hidden, weight, targets, z_loss)
    ranks_got = in_parts(ranks, hidden, weight, targets, z_loss, chunk)
    got = (sum(r[1] for r in ranks_got), torch.cat([r[2] for r in ranks_got]))
    for ours, theirs in [*zip(got, (grad_hidden, grad_weight), strict=True)] + [
        pair for r in ranks_got for pair in zip(r[0], sums, strict=True)
    ]:
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("word", [-1, 11])
def test_a_target_that_no_part_has_is_an_error(word: int) -> None:
    hidden, weight, targets = make(9, 11)
    targets[0, 0] = word
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        in_parts(2, hidden, weight, targets)


def test_no_targets_gives_zeros_not_nan() -> None:
    hidden, weight, targets = make(9, 11)
    sums, *grads = gradients(chunked_cross_entropy, hidden, weight, torch.full_like(targets, IGNORE), 0.1, 4)
    assert sums.total.item() == 0
    assert sums.loss.item() == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_large_logits_stay_finite_and_exact() -> None:
    hidden, weight, targets = make(9, 11)
    scaled = (hidden.detach() * 1e4).requires_grad_()
    expected, got = gradients(plain, scaled, weight, targets), gradients(chunked_cross_entropy, scaled, weight, targets)
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6 * theirs.abs().max().item())


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient_and_no_work(frozen: int) -> None:
    hidden, weight, targets = make(9, 11)
    expected = gradients(plain, hidden, weight, targets)[1:]
    (hidden, weight)[frozen].requires_grad_(False)
    with LargestTensor() as seen:
        chunked_cross_entropy(hidden, weight, targets, 0.0, 4).total.div(7).backward()
    assert (hidden, weight)[frozen].grad is None
    torch.testing.assert_close((hidden, weight)[1 - frozen].grad, expected[1 - frozen])
    assert seen.products == 2 * 5  # in each of 5 chunks, the logits and the one gradient


def test_without_gradients_only_logits_are_computed() -> None:
    hidden, weight, targets = make(9, 11)
    with torch.no_grad(), LargestTensor() as seen:
        sums = chunked_cross_entropy(hidden, weight, targets, 0.1, 4)
    assert seen.products == 5
    assert not sums.total.requires_grad
    torch.testing.assert_close(sums.total, plain(hidden, weight, targets, 0.1).total.detach())


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, targets = make(9, 11)
    total = chunked_cross_entropy(hidden, weight, targets).total
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, hidden, create_graph=True)


def test_backward_can_run_twice() -> None:
    hidden, weight, targets = make(9, 11)
    total = chunked_cross_entropy(hidden, weight, targets).total
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(3 * total, (hidden, weight))
    assert all(torch.equal(3 * one, three) for one, three in zip(first, second, strict=True))


@pytest.mark.parametrize("word", [-1, 11])
def test_a_target_outside_the_vocabulary_is_an_error(word: int) -> None:
    hidden, weight, targets = make(9, 11)
    targets[0, 0] = word
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        chunked_cross_entropy(hidden, weight, targets)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns, and counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_more_than_a_chunk_never_exist(dtype: torch.dtype) -> None:
    """In forward and backward, through the head. tokens x V would be 8 times as much."""
    hidden, _, targets = make(64, 500, dim=8, dtype=dtype)
    head = Head(8, 500).to(dtype)
    with LargestTensor() as seen:
        sums = head(hidden, targets, 1e-4, 16)
        assert isinstance(sums, LossSums)
        sums.total.backward()
    assert seen.numel == 16 * 500
    with LargestTensor() as seen:
        plain(hidden, head.weight, targets).total.backward()
    assert seen.numel == 128 * 500


def test_it_costs_no_time() -> None:
    """With the demo's shape, against plain cross-entropy over all logits: interleaved, median of pairs. Seen: 0.97 to
    1.00. Processor time of one thread, so that other processes do not count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    hidden, weight, targets = make(1024, 264, dim=256)
    pairs = []
    try:
        for _ in range(25):
            times = []
            for loss in (chunked_cross_entropy, plain):
                begin = time.process_time()
                gradients(loss, hidden, weight, targets)
                times.append(time.process_time() - begin)
            pairs.append(times[0] / times[1])
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(pairs[3:]) < 1.1
