"""Batches: the same samples in the same order at every world size, masks from the documents, a thread that ends."""

from __future__ import annotations

import gc
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import config, jsonl, prepared, text_folder

from configs.config import Config
from configs.errors import UserError
from models import IGNORE
from tests.machine import patience, takes_at_most
from trainer.data import loader as loader_module
from trainer.data.batch import Batch, StepBatch
from trainer.data.enough import check_enough
from trainer.data.loader import Cut, HeldOut, Loader, held_out
from trainer.data.open_tokens import tokens_of
from trainer.data.prepared import Prepared
from trainer.data.windows import Split
from trainer.tasks.lm import LanguageModelling


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("corpus")
    sources = (
        {"name": "text", "path": str(text_folder(root / "text"))},
        {"name": "lines", "kind": "jsonl", "path": str(jsonl(root / "x.jsonl")), "weight": 2.5},
    )
    data = prepared(root / "cache", config(*sources))
    return data, lambda **keys: config(*sources, **keys)


def batches(p: Prepared, cfg: Config, start: int, step: int, rank: int, world_size: int, count: int) -> list[StepBatch]:
    loader = loader_of(p, cfg, start, step, rank, world_size)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


NAMES = ("tokens", "targets", "documents")


def loader_of(p: Prepared, cfg: Config, start: int, step: int, rank: int, world_size: int) -> Loader:
    return Loader(LanguageModelling(cfg.task), p, cfg, start, step, rank, world_size)


def validation_of(p: Prepared, cfg: Config, rank: int, world_size: int) -> HeldOut:
    chosen = held_out(p, "validation", cfg.train.validate_samples)
    return HeldOut(LanguageModelling(cfg.task), chosen, cfg, rank, world_size)


def shapes(batch: Batch) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in batch.tensors.items()}


def rows(batch: StepBatch) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, targets, documents) of every sample that has a target."""
    return [
        (tokens.tolist(), targets.tolist(), documents.tolist())
        for m in batch.batches
        for tokens, targets, documents in zip(*(m.tensors[name] for name in NAMES), strict=True)
        if (targets != IGNORE).any()
    ]


@given(
    world_size=st.integers(1, 7),
    global_batch=st.integers(1, 20),
    micro_batch=st.integers(1, 5),
    start=st.integers(0, 100_000),
)
@settings(max_examples=25)
def test_all_ranks_together_hold_each_sample_of_the_order_once(
    corpus: Any, world_size: int, global_batch: int, micro_batch: int, start: int
) -> None:
    p, make = corpus
    cfg = make(train__global_batch=global_batch, train__micro_batch=micro_batch)
    alone = batches(p, make(train__global_batch=global_batch), start, 0, 0, 1, 2)
    ranks = [batches(p, cfg, start, 0, r, world_size, 2) for r in range(world_size)]
    order = p.order(cfg.run.seed)
    for i in range(2):
        positions = np.arange(start + i * global_batch, start + (i + 1) * global_batch)
        assert np.array_equal(alone[i].samples, positions)
        expected = rows(alone[i])
        assert len(expected) == global_batch
        source, sample, _ = order.draw(positions)
        for r in range(world_size):
            batch = ranks[r][i]
            assert np.array_equal(batch.samples, positions[r::world_size])
            assert rows(batch) == expected[r::world_size]
            assert [shapes(m) for m in batch.batches] == [shapes(m) for m in ranks[0][i].batches]
            assert batch.batches[0].size <= micro_batch
            assert sum(m.rows for m in batch.batches) == len(batch.samples)
            assert batch.consumed_samples == start + (i + 1) * global_batch
        assert sum(ranks[r][i].weights[0] for r in range(world_size)) == alone[i].weights[0]
        assert alone[i].weights[0] == sum(t != IGNORE for row in expected for t in row[1])
        # The samples are the ones that the order names.
        for row, s, k in zip(expected, source, sample, strict=True):
            tokens = tokens_of(p.sources[s], "train").tokens
            assert row[0] == tokens[k * 16 : k * 16 + 16].tolist()


def test_going_on_at_any_step_and_world_size_gives_the_same(corpus: Any) -> None:
    p, make = corpus
    cfg = make(train__global_batch=7)
    straight = batches(p, cfg, 0, 0, 0, 1, 12)
    for k in (1, 5, 11):
        for world_size in (1, 3):
            later = [
                batches(p, cfg, straight[k - 1].consumed_samples, k, r, world_size, 1)[0] for r in range(world_size)
            ]
            assert [b.step for b in later] == [k + 1] * world_size
            for r, batch in enumerate(later):
                assert rows(batch) == rows(straight[k])[r::world_size]


@given(share=st.integers(1, 500), micro_batch=st.integers(1, 64), world_size=st.integers(1, 50))
def test_layout_pads_no_more_than_it_must(share: int, micro_batch: int, world_size: int) -> None:
    cut = Cut.of(share * world_size, micro_batch, world_size)
    assert cut.size <= micro_batch
    assert cut.batches == -(-share // micro_batch)  # as few forwards as possible
    assert 0 <= cut.batches * cut.size - share < cut.batches


def test_more_ranks_than_samples_get_empty_ones(corpus: Any) -> None:
    p, make = corpus
    cfg = make(train__global_batch=2)
    (first,) = batches(p, cfg, 0, 0, 0, 4, 1)
    (batch,) = batches(p, cfg, 0, 0, 3, 4, 1)
    assert (batch.weights, len(batch.samples), len(batch.batches)) == ((0.0,), 0, 1)
    m = batch.batches[0]
    assert (m.rows, m.size) == (0, 1)
    tokens, targets, documents = (m.tensors[name] for name in NAMES)
    assert tokens.shape == (1, 16)
    assert first.batches[0].rows == 1
    assert torch.equal(tokens, first.batches[0].tensors["tokens"])  # the first sample of the global batch
    assert torch.equal(documents, first.batches[0].tensors["documents"])
    assert (targets == IGNORE).all()
    assert (tokens.dtype, targets.dtype, documents.dtype) == (torch.int64, torch.int64, torch.int32)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    seq_len=st.integers(2, 9),
    value=st.sampled_from([0, 256]),
)
def test_samples_against_a_plain_reading(lengths: list[int], seq_len: int, value: int) -> None:
    """No target crosses a document. Token values do not matter (here all are equal, or all are end tokens)."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    text = np.arange(len(owner), dtype=np.uint16) % 250 if value == 0 else np.full(len(owner), 256, np.uint16)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    split = Split(text, starts)
    count = split.sample_count(seq_len)
    assert count == (len(text) - 1) // seq_len
    for i in range(count):
        tokens, targets = np.empty(seq_len, np.int64), np.empty(seq_len, np.int64)
        documents = np.empty(seq_len, np.int32)
        split.write_sample(i, tokens, targets, documents)
        for t in range(seq_len):
            at = i * seq_len + t
            assert tokens[t] == text[at]
            assert documents[t] == owner[at] - owner[i * seq_len]
            assert targets[t] == (text[at + 1] if owner[at + 1] == owner[at] else IGNORE)
        unmasked = np.empty(seq_len, np.int64)
        split.write_sample(i, tokens, unmasked, None)
        assert np.array_equal(targets, unmasked)


def test_without_document_masks_targets_are_masked_all_the_same(corpus: Any) -> None:
    p, make = corpus
    (with_mask,) = batches(p, make(train__global_batch=100), 0, 0, 0, 1, 1)
    cfg = make(train__global_batch=100, data__document_mask=False)
    (without,) = batches(prepared(p.sources[0].folder.parent, cfg), cfg, 0, 0, 0, 1, 1)
    assert all(m.tensors.keys() == {*NAMES} for m in with_mask.batches)
    assert all(m.tensors.keys() == {"tokens", "targets"} for m in without.batches)
    for a, b in zip(with_mask.batches, without.batches, strict=True):
        assert torch.equal(a.tensors["tokens"], b.tensors["tokens"])
        assert torch.equal(a.tensors["targets"], b.tensors["targets"])
    assert (torch.stack([m.tensors["targets"] for m in without.batches]) == IGNORE).any()


def test_iteration_ends_with_the_last_step(corpus: Any) -> None:
    p, make = corpus
    loader = loader_of(p, make(train__steps=5), 16, 2, 0, 1)
    assert [b.step for b in loader] == [3, 4, 5]
    assert list(loader) == []
    loader.close()
    assert list(loader_of(p, make(train__steps=5), 0, 5, 0, 1)) == []


class Broken(Exception):
    pass


def test_an_error_in_the_thread_reaches_the_consumer_with_its_traceback(
    corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, make = corpus

    def write_sample_breaks(*args: Any) -> None:
        raise Broken("row")

    monkeypatch.setattr(Split, "write_sample", write_sample_breaks)
    loader = loader_of(p, make(), 0, 0, 0, 1)
    for _ in range(2):
        with pytest.raises(Broken, match="row") as e:
            next(loader)
        assert "write_sample_breaks" in "".join(traceback.format_tb(e.value.__traceback__))
    loader.close()


def ended(thread: threading.Thread) -> bool:
    thread.join(timeout=patience(2.0))
    return not thread.is_alive()


def test_close_ends_the_thread_whatever_it_is_at(corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p, make = corpus
    full = loader_of(p, make(), 0, 0, 0, 1)
    time.sleep(0.1)  # the queue is full now
    started_s = time.perf_counter()
    full.close()
    full.close()
    assert time.perf_counter() - started_s < patience(1.0)
    assert ended(full._thread)
    with pytest.raises(RuntimeError, match="closed"):
        next(full)

    slow = threading.Event()
    monkeypatch.setattr(loader_module, "assemble", lambda *a: slow.wait(0.5))
    waiting = loader_of(p, make(), 0, 0, 0, 1)
    consumer_error: list[BaseException] = []

    def consume() -> None:
        try:
            next(waiting)
        except RuntimeError as e:
            consumer_error.append(e)

    consumer = threading.Thread(target=consume)
    consumer.start()
    waiting.close()
    assert ended(consumer)
    assert ended(waiting._thread)
    assert len(consumer_error) == 1


def test_a_dropped_loader_ends_its_thread(corpus: Any) -> None:
    p, make = corpus
    loader = loader_of(p, make(), 0, 0, 0, 1)
    next(loader)
    thread = loader._thread
    del loader
    gc.collect()
    assert ended(thread)


def test_the_wait_is_measured_and_batches_are_made_ahead(corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p, make = corpus
    original, made = loader_module.assemble, []

    def slow(*args: Any) -> Any:
        time.sleep(0.1)
        made.append(1)
        return original(*args)

    monkeypatch.setattr(loader_module, "assemble", slow)
    loader = loader_of(p, make(data__prefetch_steps=3), 0, 0, 0, 1)
    next(loader)
    assert loader.wait_s > 0.05
    deadline_s = time.monotonic() + 20
    while len(made) < 5 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    time.sleep(0.25)
    assert len(made) == 5  # one taken, three in the queue, one in hand
    waited_s = []
    for _ in range(3):
        next(loader)
        waited_s.append(loader.wait_s)
    assert min(waited_s) < 0.05  # another process may have had the processor for longer once, not three times
    loader.close()


def test_validation_is_the_same_samples_at_every_layout(corpus: Any) -> None:
    p, make = corpus

    def samples(world_size: int, **keys: Any) -> list[list[int]]:
        cfg = make(**keys)
        ranks = [validation_of(p, cfg, r, world_size) for r in range(world_size)]
        assert len({len(v) for v in ranks}) == 1
        together = []
        for lists in zip(*ranks, strict=True):
            assert all([shapes(m) for m in micro] == [shapes(m) for m in lists[0]] for micro in lists)
            flat = [[row for m in micro for row in m.tensors["targets"] if (row != IGNORE).any()] for micro in lists]
            assert [len(f) for f in flat] == [sum(m.rows for m in micro) for micro in lists]
            for k in range(sum(len(f) for f in flat)):
                together.append(flat[k % world_size][k // world_size].tolist())
        return together

    expected = samples(1)
    assert len(expected) == 20
    for world_size in (2, 3, 5):
        assert samples(world_size, train__micro_batch=3) == expected
    assert samples(2, run__seed=7) == expected
    assert samples(1, train__validate_samples=6) == expected[:6]
    v = validation_of(p, make(), 0, 1)
    assert [torch.stack([m.tensors["tokens"] for m in a]).tolist() for a in v] == [
        torch.stack([m.tensors["tokens"] for m in a]).tolist() for a in v
    ]


def test_validation_takes_turns_between_sources_and_stops_at_what_there_is(corpus: Any) -> None:
    p, _ = corpus
    sizes = [tokens_of(s, "validation").sample_count(16) for s in p.sources]
    assert sizes == [len(s.validation) for s in p.sources]
    chosen = held_out(p, "validation", 10**6)
    assert len(chosen) == sum(sizes)
    for source, size in zip(p.sources, sizes, strict=True):
        assert sorted(place.index for place in chosen if place.samples is source.validation) == list(range(size))
    assert [place.samples is p.sources[k % 2].validation for k, place in enumerate(chosen[:10])] == [True] * 10


def test_validation_without_samples_is_refused(tmp_path: Path) -> None:
    source = {"name": "t", "path": str(text_folder(tmp_path / "text"))}
    p = prepared(tmp_path / "cache", config(source, data__validation_fraction=0.0))
    assert list(validation_of(p, config(source), 0, 1)) == []
    check_enough(p, config(source))
    with pytest.raises(UserError, match="validate_every_steps is 3"):
        check_enough(p, config(source, train__validate_every_steps=3))
    with pytest.raises(UserError, match="validate_every_steps is 3"):
        prepared(tmp_path / "cache", config(source, data__validation_fraction=0.0, train__validate_every_steps=3))


def test_speed_far_into_a_run(tmp_path: Path) -> None:
    source = {"name": "stdlib", "path": "python:stdlib"}
    cfg = config(source, data__seq_len=256, train__global_batch=64, train__micro_batch=8, train__steps=10**9)
    p = prepared(tmp_path / "cache", cfg)
    loader = loader_of(p, cfg, 10**12, 0, 0, 1)
    next(loader)
    try:
        takes_at_most(50 * 64 * 1e-3, lambda: [next(loader) for _ in range(50)])  # the thread's time is in it
    finally:
        loader.close()
