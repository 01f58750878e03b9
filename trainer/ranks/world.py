"""Ranks, devices and process groups, and the few collectives that the loop itself needs."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, Work  # type: ignore[attr-defined]

from configs.config import Config
from configs.errors import UserError
from trainer.host import processors
from trainer.host.console import Console
from trainer.host.environment import OMP_NUM_THREADS, TORCHELASTIC_USE_AGENT_STORE, Ranks
from trainer.host.node_name import node_name
from trainer.life.heartbeat import Heartbeat
from trainer.life.stop import StopWish
from trainer.ranks.meeting import meet

T = TypeVar("T")
_ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING"}


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks. `kv`: the store that saver threads report through; None for one
    process.

    `tensor` neighbouring ranks compute the same samples together, and count as one data rank. `heartbeat` tells the
    node's monitor what this rank is doing.
    """

    rank: int
    size: int
    node: str
    device: torch.device
    kv: Store | None
    tensor: int = 1
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the samples this rank gets."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        """How many shares there are."""
        return self.size // self.tensor

    @property
    def counts(self) -> bool:
        """Whether this rank counts for its data rank, wherever numbers about samples are summed or recorded."""
        return self.rank % self.tensor == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place. A collective."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def begin_sum(self, tensor: torch.Tensor) -> Work | None:
        """Begin to sum over all ranks, in place. Whoever reads the tensor waits for what is returned. A collective."""
        return dist.all_reduce(tensor, async_op=True) if self.size > 1 else None

    def sum_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the data ranks: values that all ranks of a tensor group share count once. A collective."""
        return self.sum(tensor if self.counts else torch.zeros_like(tensor))

    def barrier(self) -> None:
        """Wait for all ranks. A collective."""
        float(self.sum(torch.zeros(1, device=self.device)))  # read: a GPU would only queue the reduction

    def from_first(self, function: Callable[[], T], patiently: str | None = None) -> T:
        """The result of `function` on rank 0, given to every rank; an error there is raised everywhere.

        With `patiently`, a word used only once, the others wait in the store for as long as it takes. Without it they
        wait in a collective, which has a timeout.

        A collective: every rank calls it. Rank 0 alone looks at shared folders and decides, since a shared filesystem
        may show different ranks different content. Its error must reach the ranks that wait for it.
        """
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = function()
            except Exception as error:  # noqa: BLE001 - the waiting ranks must get any error
                outcome[1] = _portable(error)
            if patiently is not None and self.kv is not None:
                self.kv.set(patiently, "done")
        elif patiently is not None and self.kv is not None:
            while not self.kv.check([patiently]):
                time.sleep(0.2)
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if outcome[1] is not None:
            if isinstance(outcome[1], UserError):
                outcome[1].agreed = True
            raise outcome[1]
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank. A collective, for rare and small values."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def set_timeout(self, seconds: float) -> None:
        """Set how long a rank waits for the others. After the first step, load and compile times are over: a rank that
        does not answer is lost, not slow."""
        if self.size > 1:
            from torch.distributed.distributed_c10d import _set_pg_timeout

            for group in list(dist.distributed_c10d._world.pg_map):
                _set_pg_timeout(timedelta(seconds=seconds), group)


def _portable(error: Exception) -> Exception:
    """The error, or its text where the error cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - an unknown exception's pickling may raise anything
        return RuntimeError(repr(error))
    return error


def leave() -> None:
    """End what `start` began. The other ranks fail if they still talk to a rank that leaves, so agree first."""
    if dist.is_initialized():
        dist.destroy_process_group()


def be_deterministic() -> None:
    """Use only algorithms that give the same bits each time. Call this before a GPU is used: cuBLAS reads it once."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _settle_cuda(config: Config, environ: MutableMapping[str, str]) -> None:
    """What must be settled before a GPU is used for the first time."""
    # Segments of fixed sizes break memory up: a model that nearly fills a GPU then runs out of it with GiB to spare.
    if not _ALLOCATOR.intersection(environ):
        environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    torch.set_float32_matmul_precision("high" if config.precision.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.precision.tf32


def start(config: Config, heartbeat: Heartbeat | None = None, wish: StopWish | None = None) -> World:
    """Join the ranks that torchrun started, or be alone. Raises StopRequested when `wish` asks for it meanwhile."""
    ranks = Ranks.read(os.environ)
    rank, size = ranks.rank, ranks.size
    if OMP_NUM_THREADS.read(os.environ) is None:  # neither a person nor a launcher has decided
        threads = processors.threads(ranks.local_size, config.precision.deterministic)
        torch.set_num_threads(threads.each)
        Console(rank).say(str(threads))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if ranks.local_size > torch.cuda.device_count():
            raise UserError(f"{ranks.local_size} processes on this node, but it has {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", ranks.local_rank)
        _settle_cuda(config, os.environ)
        torch.cuda.set_device(device)
    kv = None
    if size > 1:
        timeout = timedelta(seconds=config.parallel.load_timeout_s)
        agents = TORCHELASTIC_USE_AGENT_STORE.read(os.environ) == "True"
        store = meet(ranks, node_name(), agents, timeout.total_seconds(), wish or StopWish(), Console(0).say)
        kv = PrefixStore("muster", store)
        if ranks.one_node:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo looks up the name of this host
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        group_store = PrefixStore("groups", store)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, node_name(), device, kv, config.parallel.tensor, heartbeat or Heartbeat(rank))
