"""The FSDP engine: FSDP2, HSDP, DDP and tensor parallelism by one mesh, and one process without sharding.

The mesh is (replicate, shard). Shard alone is FSDP, both are HSDP. Replicate alone is DDP: a model sharded over groups
of one rank, so that precision, names and checkpoints are the same everywhere. With tensor parallelism a third dimension
stands last (`tensor.py`), and FSDP cuts what it left on each rank. One process needs no process group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from configs.config import Config
from configs.schema.parallel import ParallelSection
from models import Model, build_model
from trainer.checkpoint.format.boxes import Group
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.load.request import Loading
from trainer.data.batch import Batch
from trainer.engines.activations import checkpoint_activations
from trainer.engines.base import T
from trainer.engines.boxes import box_of, local_part, replica_of
from trainer.engines.gradients import AddedUp
from trainer.engines.master import MasterWeights
from trainer.engines.named import DTYPES, Named
from trainer.engines.optim import add_penalties, build_optimizers, step_unless
from trainer.engines.tensor import add_up_whole, data_mesh, split_model, tensor_mesh
from trainer.host.garbage import collect_everything
from trainer.life.layout import resolve
from trainer.ranks.device import from_host
from trainer.ranks.seeds import generator
from trainer.ranks.world import World
from trainer.tasks.base import Task


def make_mesh(parallel: ParallelSection, world: World) -> DeviceMesh | None:
    """The device mesh of a layout, None for one process. The layout was checked against the world size before."""
    if world.size == 1:
        return None
    layout = resolve(parallel, world.size)
    sizes = {"replicate": layout.replicate, "shard": layout.shard, "tensor": layout.tensor}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(world.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


class FsdpEngine(Named):
    """See `trainer.engines.base.Engine` for what each method promises."""

    def __init__(self, config: Config, world: World, task: Task) -> None:
        self.config, self.world, self.task = config, world, task
        self.device = world.device
        self.mesh = make_mesh(config.parallel, world)
        self._tensor = tensor_mesh(self.mesh)
        self._params, self._compute = DTYPES[config.precision.params], DTYPES[config.precision.compute]
        self.master: MasterWeights | None = None
        self.stored: dict[str, torch.Tensor] = {}
        self._added_up = AddedUp()
        self._last: bool | None = None  # of the latest micro batch: whether it was the step's last
        self.optimizers: list[torch.optim.Optimizer] = []
        self._counted: tuple[tuple[str, ...], torch.Tensor] = ((), torch.empty(0))
        super().__init__(self._on_meta())

    def _on_meta(self) -> Model:
        with torch.device("meta"):
            built = build_model(self.config.model)
        for parameter in built.module.parameters():
            parameter.data = parameter.data.to(self._params)  # buffers keep the format that the model gave them
        return built

    def set_trainable(
        self, names: Iterable[str], held_elsewhere: Iterable[str] = (), counts: Mapping[str, int] | None = None
    ) -> None:
        parallel, trainable = self.config.parallel, set(names)
        self.optimizers, self.stored, self.master = [], {}, None
        self._counted, self._last = ((), torch.empty(0)), None
        self.built = self._on_meta()  # the old one goes before the new one takes memory
        collect_everything()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of the old engine's sizes fit nothing of the new one's
        narrow = set(held_elsewhere) - trainable if self._compute.itemsize < self._params.itemsize else set()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trainable)
            if name in narrow:
                parameter.data = parameter.data.to(self._compute)
        checkpoint_activations(self.built, parallel.activation_checkpoint)
        if parallel.compile:
            for block in self.built.blocks:
                block.compile(fullgraph=True)
        compute = None if self._compute == self._params else self._compute
        if self._tensor is not None:
            split_model(self.built, self._tensor)
        if self.mesh is not None:
            self._shard(data_mesh(self.mesh), compute)
        offloaded = parallel.cpu_offload and self.mesh is not None
        self.model.to_empty(device="cpu" if offloaded else self.device)
        for module in self.model.modules() if offloaded else []:
            module._buffers.update({n: b.to(self.device) for n, b in module._buffers.items() if b is not None})
        self._rebuild_buffers()
        if self.mesh is None and compute is not None:
            self.master = MasterWeights(self.model, compute)
            self.stored = dict(self.master.stored)
        else:
            self.stored = dict(self.model.named_parameters())
        self.optimizers = build_optimizers(
            self.config.optim, self.built, {name: p for name, p in self.stored.items() if name in trainable}
        )

    def _shard(self, mesh: DeviceMesh, compute: torch.dtype | None) -> None:
        parallel = self.config.parallel
        # FSDP must not cast inputs: rotary tables in bf16 would blur positions.
        precision = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if parallel.cpu_offload else OffloadPolicy()
        reshard = parallel.reshard and mesh.shape[-1] > 1
        units = [list(unit) for unit in self.built.units]
        for unit in units:
            fully_shard(
                unit if len(unit) > 1 else unit[0],
                mesh=mesh,
                # Backward uses the last unit first. If forward freed it, it would be gathered twice in a row.
                reshard_after_forward=reshard and unit is not units[-1],
                mp_policy=precision,
                offload_policy=offload,
            )
        fully_shard(self.model, mesh=mesh, reshard_after_forward=False, mp_policy=precision, offload_policy=offload)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # The loss is divided by the global weight already, so gradients must be plain sums over ranks. gloo
                # has no pre-multiplied sum, so it must be forced.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self._prefetch(list(self.built.blocks), parallel.prefetch_blocks)

    def _prefetch(self, blocks: list[Any], ahead: int) -> None:
        if ahead <= 1 or self.device.type != "cuda":
            return  # FSDP2 itself gathers one block ahead
        for i, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + ahead])
            block.set_modules_to_backward_prefetch(blocks[max(0, i - ahead) : i][::-1])

    # ---- parameters -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, seed: int, names: Iterable[str] | None = None) -> None:
        every = self.stored | self._buffers()
        for name in every if names is None else names:
            stored = every[name]
            # Drawn whole and cut, never drawn per shard. Under FSDP2 on the CPU every shard would get the same values.
            # The weights would also depend on the world size.
            whole = torch.empty(stored.shape, dtype=torch.float32, device=self.device)
            self.built.initialise(name, whole, generator(self.device, seed, "init", name))
            offsets, sizes = box_of(stored)
            part = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
            local_part(stored).copy_(part)
        self._parameters_changed()

    def trainable(self) -> set[str]:
        return {name for name, p in self.model.named_parameters() if p.requires_grad}

    def _parameters_changed(self, trained_only: bool = False) -> None:
        if self.master is not None:
            self.master.copy_to_compute(trained_only)

    # ---- one update -------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Batch, scale: Callable[[], torch.Tensor], last: bool) -> torch.Tensor:
        self._synchronise(last)
        total, sums = self._sums(self.model, batch)
        self._weighted(total, scale(), sums).backward()
        if self._params.itemsize < 4:
            self._added_up.take(self.stored.values(), last)
        if last and self._tensor is not None:
            add_up_whole(self._grads().values(), self._tensor)
        return sums

    def _synchronise(self, last: bool) -> None:
        """Tell FSDP whether this backward is the last of the step. It walks all modules, so only when that changes."""
        if self.mesh is None or self._last == last:
            return
        model = cast(FSDPModule, self.model)
        model.set_requires_gradient_sync(last or self.config.parallel.accumulate == "sharded")
        model.set_requires_all_reduce(last)
        self._last = last

    @torch.no_grad()
    def update(self, lr_factor: float, clip: float | None) -> torch.Tensor:
        grads = self._grads()
        norm = self._norm(grads)
        if clip is not None and grads:
            factor = torch.where(norm > clip, clip / (norm + 1e-6), 1.0)
            torch._foreach_mul_([local_part(g) for g in grads.values()], factor)
        add_penalties(self.config.optim, self.built, self.stored)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
            step_unless(~torch.isfinite(norm), optimizer)
        self._parameters_changed(trained_only=True)
        for stored in self.stored.values():
            stored.grad = None
        return norm.to(self.device, non_blocking=True)  # of offloaded gradients it lies on the CPU

    def _grads(self) -> dict[str, torch.Tensor]:
        return {name: p.grad for name, p in self.stored.items() if p.grad is not None}

    def _norm(self, grads: dict[str, torch.Tensor]) -> torch.Tensor:
        """Global 2-norm over all ranks, by one all-reduce; fp64 0-d, where the gradients lie."""
        if not grads:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        norms = torch.stack(torch._foreach_norm([local_part(g) for g in grads.values()], 2, dtype=torch.float32))
        square = (norms.double().square() / self._copies(grads)).sum()  # each element counts once
        if self.mesh is not None:
            dist.all_reduce(square)
        return square.sqrt()

    def _copies(self, grads: dict[str, torch.Tensor]) -> torch.Tensor:
        """How many ranks hold each gradient, fp64 [gradients]. Made once for the same gradients: a step that made it
        anew would wait for the device."""
        names = tuple(grads)
        if self._counted[0] != names:
            counts = [float(replica_of(g)[1]) for g in grads.values()]
            self._counted = (names, from_host(counts, local_part(next(iter(grads.values()))).device))
        return self._counted[1]

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: local_part(g) for name, g in self._grads().items()}

    def evaluate(self, batch: Batch) -> torch.Tensor:
        with self._evaluating():
            return self._sums(self.model, batch)[1]

    def call(self, function: Callable[[Callable[..., Any]], T]) -> T:
        with self._evaluating():
            return function(self.model)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pieces(self) -> list[Piece]:
        trainable = self.trainable()
        found = []
        for name, stored in self.stored.items():
            piece = self._piece(name, "model" if name in trainable else "frozen", stored, stored)
            found.append(replace(piece, original=stored.dtype == self._infos[name].dtype))
        for name, buffer in self._buffers().items():
            shape = tuple(buffer.shape)
            found.append(
                Piece(name, "model", buffer, shape, (0,) * len(shape), shape, self.world.rank, self.world.size)
            )
        for name, optimizer, parameter in self._trained():
            state = optimizer.state.get(parameter, {})
            for key in self.state_keys(name):
                if key in state:
                    found.append(self._piece(f"{name}.{key}", "optim", state[key], parameter))
        return found

    def _piece(self, key: str, group: Group, tensor: torch.Tensor, like: torch.Tensor) -> Piece:
        offsets, sizes = box_of(like)
        return Piece(key, group, local_part(tensor), tuple(like.shape), offsets, sizes, *replica_of(like))

    def _trained(self) -> Iterable[tuple[str, torch.optim.Optimizer, torch.Tensor]]:
        names = {id(p): name for name, p in self.stored.items()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield names[id(parameter)], optimizer, parameter

    def flops(self, example: Batch) -> float:
        return self.built.flops(example.tensors)

    def step_counts(self) -> dict[str, int]:
        return {
            name: int(optimizer.state[parameter]["step"])
            for name, optimizer, parameter in self._trained()
            if "step" in optimizer.state.get(parameter, {})
        }

    @torch.no_grad()
    def load(self, loading: Loading) -> None:
        for optimizer in self.optimizers:
            optimizer.state.clear()  # of a checkpoint that proved bad halfway
        for name, stored in (self.stored | self._buffers()).items():
            loading.want(name, *box_of(stored), local_part(stored))
        for name, optimizer, parameter in self._trained():
            for key in self.state_keys(name):
                if loading.has(f"{name}.{key}"):
                    optimizer.state[parameter][key] = torch.zeros_like(parameter)
                    state = local_part(optimizer.state[parameter][key])
                    loading.want(f"{name}.{key}", *box_of(parameter), state)
            if optimizer.state.get(parameter) and self.counts_steps(name):
                # fused Adam keeps its count in fp32 beside the parameter
                count = torch.tensor(float(loading.count(name)), dtype=torch.float32, device=parameter.device)
                optimizer.state[parameter]["step"] = count
        loading.read()

    def after_load(self) -> None:
        self._parameters_changed()

    def close(self) -> None:
        """Nothing lies on disk."""
