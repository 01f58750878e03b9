"""The global order: a bijection per epoch and exact quotas, which depend only on (seed, sizes, weights)."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from tests.machine import takes_at_most
from trainer.data.order import BLOCK_DRAWS, Order, base_key, permute, quotas

keys = st.integers(0, 2**64 - 1).map(lambda k: np.array([k], dtype=np.uint64))


@given(size=st.integers(1, 3000), key=keys)
def test_permute_is_a_bijection(size: int, key: np.ndarray) -> None:
    out = permute(np.arange(size, dtype=np.uint64), size, key)
    assert np.array_equal(np.sort(out), np.arange(size))


@given(size=st.integers(2**20, 2**50), key=keys, data=st.data())
@settings(max_examples=30)
def test_permute_of_a_huge_domain_stays_inside_and_collides_never(
    size: int, key: np.ndarray, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, size - 1000))
    out = permute(np.arange(start, start + 1000, dtype=np.uint64), size, key)
    assert out.max() < size
    assert len(np.unique(out)) == 1000


@given(size=st.integers(1, 500), seed=st.integers(0, 2**32))
@settings(max_examples=30)
def test_a_key_per_element_gives_the_same_as_one_key_at_a_time(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    index = rng.integers(0, size, 20).astype(np.uint64)
    many = rng.integers(0, 2**63, 20).astype(np.uint64)
    together = permute(index, size, many)
    assert together.tolist() == [int(permute(index[i : i + 1], size, many[i : i + 1])[0]) for i in range(20)]


@pytest.mark.parametrize("size", [5, 16, 100])
def test_every_index_goes_everywhere_equally_often(size: int) -> None:
    draws = 200 * size
    key = np.array([base_key("test", i) for i in range(draws)], dtype=np.uint64)
    for index in (0, size - 1):
        counts = np.bincount(permute(np.full(draws, index, np.uint64), size, key).astype(int), minlength=size)
        chi2 = float(((counts - 200.0) ** 2 / 200.0).sum())
        assert chi2 < size - 1 + 5 * np.sqrt(2 * (size - 1)), counts


def test_neighbours_are_torn_apart() -> None:
    out = permute(np.arange(100_000, dtype=np.uint64), 100_000, np.array([7], dtype=np.uint64)).astype(float)
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(out, np.arange(100_000))[0, 1]) < 0.02


# The smallest share, 0.05 in 200, still gets a draw in each block.
sources = st.lists(st.tuples(st.integers(1, 20_000), st.floats(0.05, 50.0)), min_size=1, max_size=5)


@given(sources=sources, seed=st.integers(-(2**40), 2**40), first_block=st.sampled_from([0, 1, 10**9]))
@settings(max_examples=25)
def test_each_block_holds_its_quotas_and_each_epoch_each_sample_once(
    sources: list[tuple[int, float]], seed: int, first_block: int
) -> None:
    sizes, weights = [s for s, _ in sources], [w for _, w in sources]
    order = Order(sizes, weights, seed)
    blocks = 3
    positions = np.arange(first_block * BLOCK_DRAWS, (first_block + blocks) * BLOCK_DRAWS)
    source, sample, epoch = order.draw(positions)
    for b in range(blocks):
        inside = source[b * BLOCK_DRAWS : (b + 1) * BLOCK_DRAWS]
        assert np.bincount(inside, minlength=len(sizes)).tolist() == order.quotas
    for s, size in enumerate(sizes):
        draws = first_block * order.quotas[s] + np.arange(blocks * order.quotas[s])
        own_epoch, own_sample = epoch[source == s], sample[source == s]
        assert np.array_equal(np.sort(own_epoch), draws // size)
        assert own_sample.min() >= 0
        assert own_sample.max() < size
        # No sample occurs twice in an epoch. With the counts above, whole epochs hold each sample exactly once.
        assert len(np.unique(own_epoch * size + own_sample)) == len(draws)


@given(sources=sources, seed=st.integers(0, 2**32), positions=st.lists(st.integers(0, 2**45), min_size=1, max_size=30))
@settings(max_examples=25)
def test_any_position_alone_gives_the_same(sources: list[tuple[int, float]], seed: int, positions: list[int]) -> None:
    order = Order([s for s, _ in sources], [w for _, w in sources], seed)
    together = np.stack(order.draw(np.array(positions)))
    for i, p in enumerate(positions):
        assert together[:, i].tolist() == np.concatenate(order.draw(np.array([p]))).tolist()


def test_blocks_seeds_epochs_and_sources_have_permutations_of_their_own() -> None:
    size = 2 * BLOCK_DRAWS  # an epoch of each source is four blocks

    def block(seed: int, b: int) -> tuple[list[int], set[int], set[int]]:
        """Which source is at which place in a block, and which samples of both sources are in it."""
        source, sample, _ = Order([size, size], [1.0, 1.0], seed).draw(
            np.arange(b * BLOCK_DRAWS, (b + 1) * BLOCK_DRAWS)
        )
        return source.tolist(), set(sample[source == 0].tolist()), set(sample[source == 1].tolist())

    places, first, second = block(0, 0)
    assert first != second
    assert places != block(0, 1)[0]
    assert places != block(1, 0)[0]
    assert first != block(1, 0)[1]
    assert first != block(0, 4)[1]  # the same block of the next epoch
    assert places[: BLOCK_DRAWS // 8].count(0) == pytest.approx(BLOCK_DRAWS // 16, rel=0.15)


def test_the_order_is_the_same_as_ever() -> None:
    """A change of these digits would give every continued run other samples."""
    source, sample, epoch = Order([1000, 7, 123_457], [1.0, 0.1, 3.3], 42).draw(np.arange(0, 10**9, 49_999))
    digest = hashlib.sha256(np.stack([source, sample, epoch]).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "3826ab161328a2cc"


@given(weights=st.lists(st.floats(0.5, 50.0), min_size=1, max_size=30))
def test_quotas_add_up_and_are_the_nearest_below_or_above(weights: list[float]) -> None:
    found = quotas(weights)
    exact = BLOCK_DRAWS * np.array(weights) / sum(weights)
    assert sum(found) == BLOCK_DRAWS
    assert np.all(np.abs(np.array(found) - exact) < 1 + 1e-6)


def test_a_weight_too_small_is_refused_by_name_with_one_that_is_enough() -> None:
    with pytest.raises(UserError, match="'tiny' is too small") as e:
        quotas([1.0, 1e-9, 2.0], ["a", "tiny", "b"])
    enough = float(str(e.value).rsplit(" ", 1)[1])
    assert quotas([1.0, enough, 2.0])[1] == 1


def test_speed_of_a_block() -> None:
    order = Order([10**6, 10**5, 12_345], [5.0, 1.0, 0.1], 0)
    positions = np.arange(BLOCK_DRAWS)
    takes_at_most(BLOCK_DRAWS / 500_000, lambda: order.draw(positions), tries=10)
