"""Which layouts fit which numbers of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.schema.parallel import ParallelSection
from trainer.life.layout import Layout, resolve


@given(st.integers(1, 64), st.integers(1, 8), st.sampled_from(["replicate", "shard"]))
def test_what_is_left_goes_to_the_open_side(world_size: int, given_side: int, fixed: str) -> None:
    other = "shard" if fixed == "replicate" else "replicate"
    parallel = ParallelSection.model_validate({fixed: given_side, other: -1})
    if world_size % given_side:
        with pytest.raises(UserError, match=f"is not the {world_size} rank"):
            resolve(parallel, world_size)
    else:
        layout = resolve(parallel, world_size)
        assert getattr(layout, fixed) == given_side
        assert layout.replicate * layout.shard == world_size


def test_a_product_that_is_not_the_world_size_is_refused() -> None:
    assert resolve(ParallelSection(replicate=2, shard=2), 4) == Layout(2, 2)
    with pytest.raises(UserError, match="2 x 2 is not the 8"):
        resolve(ParallelSection(replicate=2, shard=2), 8)


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 4))
def test_tensor_groups_are_set_apart_first(tensor: int, shard: int, replicate: int) -> None:
    world_size = tensor * shard * replicate
    expected = Layout(replicate, shard, tensor)
    assert resolve(ParallelSection(replicate=replicate, tensor=tensor), world_size) == expected
    assert resolve(ParallelSection(replicate=-1, shard=shard, tensor=tensor), world_size) == expected
    assert resolve(ParallelSection(replicate=replicate, shard=shard, tensor=tensor), world_size) == expected


def test_a_tensor_group_that_is_not_full_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel.tensor=4 does not divide the 6 rank\(s\)"):
        resolve(ParallelSection(tensor=4), 6)
    with pytest.raises(UserError, match=r"parallel.tensor=2: 2 x 3 x 2 is not the 8"):
        resolve(ParallelSection(replicate=2, shard=3, tensor=2), 8)
    with pytest.raises(UserError, match=r"parallel.tensor=2 does not divide the 1"):
        resolve(ParallelSection(tensor=2), 1)
