"""Batches from the global order, made ahead by a thread.

Of a global batch, rank r of W data-parallel ranks gets every W-th position. Every rank runs the same number of micro
batches of the same size; places that are left over hold empty samples without targets, which are not consumed. So any
world size and any global batch go, and the samples of a step never depend on the cut.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from configs.config import Config
from models import IGNORE
from trainer.data.enough import check_enough
from trainer.data.order import base_key, permute
from trainer.data.prepared import Prepared, Split


@dataclass
class MicroBatch:
    """One forward: tokens and targets (B, T) int64, documents (B, T) int32, or None without document masks."""

    tokens: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor | None

    def to(self, device: torch.device) -> MicroBatch:
        """On `device`; a copy from page-locked memory runs behind the work that is queued there."""
        documents = None if self.documents is None else self.documents.to(device, non_blocking=True)
        return MicroBatch(
            self.tokens.to(device, non_blocking=True), self.targets.to(device, non_blocking=True), documents
        )


@dataclass
class StepBatch:
    """One rank's share of a step."""

    step: int  # the number of the step that this batch makes, from 1
    micro_batches: list[MicroBatch]
    target_tokens: int  # of this rank
    samples: np.ndarray  # this rank's positions in the global order, int64
    consumed_samples: int  # the position after this step


@dataclass(frozen=True)
class Cut:
    """How a rank's share of a global batch is cut: the same on every rank."""

    micro_batches: int
    size: int  # samples of a micro batch

    @staticmethod
    def of(global_batch: int, micro_batch: int, world_size: int) -> Cut:
        share = -(-global_batch // world_size)
        count = -(-share // micro_batch)
        return Cut(count, -(-share // count))


def assemble(
    samples: list[tuple[Split, int]], cut: Cut, seq_len: int, document_mask: bool
) -> tuple[list[MicroBatch], int]:
    """Micro batches that hold these samples in this order, then empty ones; and the number of their targets."""
    shape = (cut.micro_batches, cut.size, seq_len)
    tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
    documents = np.zeros(shape, np.int32) if document_mask else None
    for place, (split, index) in enumerate(samples):
        m, b = divmod(place, cut.size)
        split.write_sample(index, tokens[m, b], targets[m, b], None if documents is None else documents[m, b])
    micro_batches = [
        MicroBatch(
            torch.from_numpy(tokens[m]),
            torch.from_numpy(targets[m]),
            None if documents is None else torch.from_numpy(documents[m]),
        )
        for m in range(cut.micro_batches)
    ]
    return micro_batches, int(np.count_nonzero(targets != IGNORE))


class Loader:
    """Iterates over the batches of steps `step + 1` ... `train.steps` of one rank; `close` it in the end.

    start: consumed samples so far; rank, world_size: data-parallel; pin: page-locked memory for copies to a GPU.
    An error in the thread is raised by `next` with the thread's traceback, again and again.
    """

    def __init__(
        self, prepared: Prepared, config: Config, start: int, step: int, rank: int, world_size: int, pin: bool = False
    ) -> None:
        if start < 0 or not 0 <= rank < world_size:
            raise ValueError(f"no such position: consumed samples {start}, rank {rank} of {world_size}")
        self.wait_s = 0.0  # how long the last `next` waited for the thread
        self._queue: queue.Queue[StepBatch | BaseException | None] = queue.Queue(config.data.prefetch_steps)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._done = False
        maker = _Maker(prepared, config, start, step, rank, world_size)
        # The thread's current device is its own: without this, pinning would open a context on GPU 0 from every rank.
        device = torch.cuda.current_device() if pin else None
        # The thread holds no reference to self, so a loader that was dropped without `close` still ends it.
        self._thread = threading.Thread(
            target=_work, args=(maker, self._queue, self._stop, device), name="data-loader", daemon=True
        )
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        started_s = time.perf_counter()
        item = self._get()
        self.wait_s = time.perf_counter() - started_s
        if isinstance(item, StepBatch):
            return item
        self._done = True
        self._error = self._error or item
        if self._error is not None:
            raise self._error
        raise StopIteration

    def _get(self) -> StepBatch | BaseException | None:
        while not self._done:
            if self._stop.is_set():
                raise RuntimeError("this loader was closed")
            try:
                return self._queue.get(timeout=0.2)
            except queue.Empty:
                continue
        return None

    def close(self) -> None:
        """End the thread. Safe to call twice, from any thread, and while the thread waits for room."""
        self._stop.set()
        self._thread.join(timeout=10.0)


class _Maker:
    """Builds batches one after the other; used by the loader's thread alone."""

    def __init__(self, prepared: Prepared, config: Config, start: int, step: int, rank: int, world_size: int) -> None:
        self._splits = [s.train for s in prepared.sources]
        self._order = prepared.order(config)
        self._global_batch, self._last_step = config.train.global_batch, config.train.steps
        self._cut = Cut.of(self._global_batch, config.train.micro_batch, world_size)
        self._seq_len, self._document_mask = config.data.seq_len, config.data.document_mask
        self._consumed, self._step, self._rank, self._world_size = start, step, rank, world_size

    def next(self) -> StepBatch | None:
        if self._step >= self._last_step:
            return None
        positions = np.arange(self._consumed, self._consumed + self._global_batch, dtype=np.int64)
        source, sample, _ = self._order.draw(positions)
        mine = slice(self._rank, None, self._world_size)
        samples = [(self._splits[s], i) for s, i in zip(source[mine].tolist(), sample[mine].tolist(), strict=True)]
        micro_batches, target_tokens = assemble(samples, self._cut, self._seq_len, self._document_mask)
        self._step += 1
        self._consumed += self._global_batch
        return StepBatch(
            step=self._step,
            micro_batches=micro_batches,
            target_tokens=target_tokens,
            samples=positions[mine],
            consumed_samples=self._consumed,
        )


def _work(maker: _Maker, out: queue.Queue, stop: threading.Event, device: int | None) -> None:
    """The thread: makes batches until the last one, an error, or `stop`. Never blocks for long."""
    item: StepBatch | BaseException | None
    try:
        if device is not None:
            torch.cuda.set_device(device)
    except BaseException as e:  # noqa: BLE001
        _put(e, out, stop)
        return
    while not stop.is_set():
        try:
            item = maker.next()
            if item is not None and device is not None:
                item.micro_batches = [_pinned(m) for m in item.micro_batches]
        except BaseException as e:  # noqa: BLE001  # whatever it is, the consumer must hear of it
            item = e
        _put(item, out, stop)
        if not isinstance(item, StepBatch):
            return


def _put(item: StepBatch | BaseException | None, out: queue.Queue, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            out.put(item, timeout=0.2)
            return
        except queue.Full:
            continue


def _pinned(m: MicroBatch) -> MicroBatch:
    documents = None if m.documents is None else m.documents.pin_memory()
    return MicroBatch(m.tokens.pin_memory(), m.targets.pin_memory(), documents)


class ValidationBatches:
    """The validation samples in batches of `train.global_batch`, each a list of micro batches as a step has them.

    Iterating again gives the same. Every rank gets the same number of lists and micro batches.
    """

    def __init__(self, prepared: Prepared, config: Config, rank: int, world_size: int) -> None:
        self._samples = validation_samples(prepared, config)
        self._chunk = min(config.train.global_batch, max(len(self._samples), 1))
        self._cut = Cut.of(self._chunk, config.train.micro_batch, world_size)
        self._rank, self._world_size = rank, world_size
        self._seq_len, self._document_mask = config.data.seq_len, config.data.document_mask

    def __len__(self) -> int:
        return -(-len(self._samples) // self._chunk)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for begin in range(0, len(self._samples), self._chunk):
            mine = self._samples[begin : begin + self._chunk][self._rank :: self._world_size]
            yield assemble(mine, self._cut, self._seq_len, self._document_mask)[0]


def validation_samples(prepared: Prepared, config: Config) -> list[tuple[Split, int]]:
    """The first `train.validate_samples` held-out samples, round robin over the sources (weights do not count).

    Each source goes through its held-out samples in a fixed permutation: a spread over all documents that is the same
    for every seed, so that runs compare.
    """
    wanted, seq_len = config.train.validate_samples, config.data.seq_len
    rounds: list[tuple[int, int, Split, int]] = []
    for s, source in enumerate(prepared.sources):
        size = source.validation.sample_count(seq_len)
        first = np.arange(min(size, wanted), dtype=np.uint64)
        key = np.array([base_key("validation", s)], dtype=np.uint64)
        chosen = permute(first, size, key).tolist() if size else []
        rounds += [(k, s, source.validation, int(index)) for k, index in enumerate(chosen)]
    rounds.sort(key=lambda r: r[:2])
    return [(split, index) for _, _, split, index in rounds[:wanted]]


def validation_batches(prepared: Prepared, config: Config, rank: int, world_size: int) -> ValidationBatches:
    """See `ValidationBatches`. UserError when validation is asked for and there is no sample for it."""
    check_enough(prepared, config)
    return ValidationBatches(prepared, config, rank, world_size)
