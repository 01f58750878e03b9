"""Batches from the global order, made ahead by a thread.

Of a global batch, rank r of W data-parallel ranks gets every W-th position, from the r-th on. Every rank runs the same
number of micro batches of the same size. Rows that are left over repeat a sample of the global batch with weight 0. So
any world size and any global batch work, and the samples of a step never depend on the cut.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from configs.config import Config
from trainer.data.batch import Batch, Collates, Row, StepBatch
from trainer.data.order import base_key, permute
from trainer.data.prepared import Prepared
from trainer.data.samples import Samples


@dataclass(frozen=True)
class Cut:
    """How a rank's share of a global batch is cut into micro batches, the same on every rank."""

    batches: int  # micro batches of a step
    size: int  # rows of each

    @staticmethod
    def of(global_batch: int, micro_batch: int, world_size: int) -> Cut:
        share = -(-global_batch // world_size)
        count = -(-share // micro_batch)
        return Cut(count, -(-share // count))


@dataclass(frozen=True)
class Place:
    """A sample: its source, its number in that source, and the pass over that source."""

    samples: Samples
    index: int
    epoch: int = 0


def assemble(task: Collates, seed: int, mine: Sequence[Place], cut: Cut, fill: Place) -> list[Batch]:
    """Batches of these samples in this order. Rows that are left over hold the sample `fill`, of weight 0."""
    batches = []
    for begin in range(0, cut.batches * cut.size, cut.size):
        places = mine[begin : begin + cut.size]
        filled = [*places, *[fill] * (cut.size - len(places))]
        samples = [place.samples.read(place.index) for place in filled]
        rows = [Row(seed, place.epoch, place.index) for place in filled]
        batches.append(task.collate(samples, len(places), rows))
    return batches


def weigh(task: Collates, batches: Sequence[Batch]) -> tuple[float, ...]:
    """The task's weights, summed over batches on the host."""
    each = [task.weigh(batch) for batch in batches]
    return tuple(float(sum(weights)) for weights in zip(*each, strict=True))


class Loader:
    """Iterates over the batches of steps `step + 1` ... `train.steps` of one rank. The owner must `close` it.

    start: consumed samples so far; rank, world_size: data-parallel; pin: page-locked memory for copies to a GPU. `next`
    raises an error of the thread, with the thread's traceback, at every call.
    """

    def __init__(
        self,
        task: Collates,
        prepared: Prepared,
        config: Config,
        start: int,
        step: int,
        rank: int,
        world_size: int,
        pin: bool = False,
    ) -> None:
        if start < 0 or not 0 <= rank < world_size:
            raise ValueError(f"no such position: consumed samples {start}, rank {rank} of {world_size}")
        self.wait_s = 0.0  # how long the last `next` waited for the thread
        self._queue: queue.Queue[StepBatch | BaseException | None] = queue.Queue(config.data.prefetch_steps)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._done = False
        maker = _Maker(task, prepared, config, start, step, rank, world_size)
        # A new thread has its own current device: without this, pinning would open a context on GPU 0 from every rank.
        device = torch.cuda.current_device() if pin else None
        # The thread holds no reference to self. So a loader that was dropped without `close` still ends its thread.
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
        """End the thread. May be called twice, from any thread, and while the thread waits for room in the queue."""
        self._stop.set()
        self._thread.join(timeout=10.0)


class _Maker:
    """Builds batches one after the other. Only the loader's thread uses it."""

    def __init__(
        self, task: Collates, prepared: Prepared, config: Config, start: int, step: int, rank: int, world_size: int
    ) -> None:
        self._task, self._seed = task, config.run.seed
        self._splits = [s.train for s in prepared.training]
        self._order = prepared.order(config.run.seed)
        self._global_batch, self._last_step = config.train.global_batch, config.train.steps
        self._cut = Cut.of(self._global_batch, config.train.micro_batch, world_size)
        self._consumed, self._step, self._rank, self._world_size = start, step, rank, world_size

    def next(self) -> StepBatch | None:
        if self._step >= self._last_step:
            return None
        positions = np.arange(self._consumed, self._consumed + self._global_batch, dtype=np.int64)
        source, sample, epoch = (column.tolist() for column in self._order.draw(positions))
        drawn = list(zip(source, sample, epoch, strict=True))
        mine = slice(self._rank, None, self._world_size)
        first, *places = [Place(self._splits[s], i, e) for s, i, e in (drawn[0], *drawn[mine])]
        batches = assemble(self._task, self._seed, places, self._cut, first)
        self._step += 1
        self._consumed += self._global_batch
        return StepBatch(
            step=self._step,
            batches=batches,
            weights=weigh(self._task, batches),
            samples=positions[mine],
            consumed_samples=self._consumed,
            cost=sum(self._splits[s].cost(i) for s, i, _ in drawn),
        )


def _work(maker: _Maker, out: queue.Queue, stop: threading.Event, device: int | None) -> None:
    """The thread: make batches until the last one, an error, or `stop`. It never blocks for long."""
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
                item.batches = [batch.pinned() for batch in item.batches]
        except BaseException as e:  # noqa: BLE001  # the consumer must get any error
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


class HeldOut:
    """Held-out samples in batches of `train.global_batch`, each cut as a step is. Gives this rank's batches.

    Each iteration gives the same batches. Every rank gets the same number of batches.
    """

    def __init__(self, task: Collates, chosen: Sequence[Place], config: Config, rank: int, world_size: int) -> None:
        self._task, self._seed, self._chosen = task, config.run.seed, chosen
        self._chunk = min(config.train.global_batch, max(len(chosen), 1))
        self._cut = Cut.of(self._chunk, config.train.micro_batch, world_size)
        self._mine = slice(rank, None, world_size)

    def __len__(self) -> int:
        return -(-len(self._chosen) // self._chunk)

    def __iter__(self) -> Iterator[list[Batch]]:
        for begin in range(0, len(self._chosen), self._chunk):
            chunk = self._chosen[begin : begin + self._chunk]
            yield assemble(self._task, self._seed, chunk[self._mine], self._cut, chunk[0])


def held_out(prepared: Prepared, split: str, wanted: int | None = None) -> list[Place]:
    """The first `wanted` samples of a split (default: all), taken from the sources in turns (weights do not count).

    Each source goes through its held-out samples in a fixed permutation. So the samples are spread over all documents,
    and are the same for every seed: runs can be compared.
    """
    rounds: list[tuple[int, int, Place]] = []
    for s, source in enumerate(prepared.sources):
        samples = source.splits.get(split)
        if samples is None:
            continue
        size = len(samples)
        first = np.arange(size if wanted is None else min(size, wanted), dtype=np.uint64)
        key = np.array([base_key("validation", s)], dtype=np.uint64)
        chosen = permute(first, size, key).tolist() if size else []
        rounds += [(k, s, Place(samples, int(index))) for k, index in enumerate(chosen)]
    rounds.sort(key=lambda r: r[:2])
    return [place for _, _, place in rounds[:wanted]]
