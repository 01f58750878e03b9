"""The ZeRO engine: DeepSpeed's stages 1, 2 and 3 behind the same protocol, under plain torchrun or in one process.

DeepSpeed steps and communicates; what is saved, loaded, averaged and skipped is decided here. Where its parts of a
tensor lie is known to `partitions.py` alone.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from configs.config import Config
from configs.deepspeed import deepspeed_settings
from configs.errors import UserError
from models import Model, build_model
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.load.request import Loading
from trainer.data.batch import Batch
from trainer.engines.activations import checkpoint_activations
from trainer.engines.base import T
from trainer.engines.named import DTYPES, Named
from trainer.engines.optim import build_optimizers
from trainer.engines.zero.partitions import Fragment, Partitions, leave_secondary_group, partition_module, share_of
from trainer.engines.zero.swapped import Swapping
from trainer.host.garbage import collect_everything
from trainer.ranks.device import from_host
from trainer.ranks.seeds import generator
from trainer.ranks.world import World
from trainer.tasks.base import Task

BUCKET_ELEMENTS = 500_000_000  # reduced at once, at most: DeepSpeed's own default


class ZeroEngine(Named):
    """See `trainer.engines.base.Engine` for what each method promises."""

    def __init__(self, config: Config, world: World, task: Task) -> None:
        self.config, self.world, self.task = config, world, task
        self.device = world.device
        self._stage, self._compute = config.parallel.zero_stage, DTYPES[config.precision.compute]
        self._settings = deepspeed_settings(config)
        _start_deepspeed(world)
        world.from_first(self._check_settings)
        self._swapping = Swapping(self._settings)
        self._swapping.check(world)
        with torch.device("meta"):
            super().__init__(build_model(config.model))
        # DeepSpeed takes memory for a bucket as large as it may be, even if the model is small.
        numel = sum(math.prod(info.shape) for info in self._infos.values())
        self._settings["zero_optimization"].setdefault("reduce_bucket_size", min(BUCKET_ELEMENTS, numel))
        largest = max(math.prod(info.shape) for info in self._infos.values())
        self._swapping.set_buffers(world, -(-largest // world.size), len(list(self.built.blocks[0].parameters())))
        self._engine: Any = None
        self._parts: Partitions
        self._named: dict[str, nn.Parameter] = {}
        # Of what is frozen forward reads a copy in the compute dtype; the originals of this rank's share, where no
        # checkpoint holds them.
        self._originals: dict[str, torch.Tensor] = {}

    def _check_settings(self) -> None:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError

        try:
            DeepSpeedZeroConfig(**self._settings["zero_optimization"])
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise UserError(f"parallel.deepspeed: DeepSpeed refuses zero_optimization: {wrong}") from error

    # ---- building ---------------------------------------------------------------------------------------------------

    def set_trainable(
        self, names: Iterable[str], held_elsewhere: Iterable[str] = (), counts: Mapping[str, int] | None = None
    ) -> None:
        import deepspeed

        self._destroy()
        trainable, held = set(names), set(held_elsewhere)
        self._swapping.check_space(self.world, self._bytes_to_swap(trainable))
        self._swapping.make_folders()
        self.built = self._allocate(trainable)
        self._rebuild_buffers()
        self._named = dict(self.model.named_parameters())
        parallel = self.config.parallel
        checkpoint_activations(self.built, parallel.activation_checkpoint)
        if self._stage == 3 and (parallel.compile or parallel.activation_checkpoint == "selective"):
            self._make_leaves()
        if parallel.compile:
            self._compile()
        trained = {name: p for name, p in self._named.items() if name in trainable}
        optimizer, groups = self._optimizer(trained, counts or {})
        self._engine = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=self._settings, dist_init_required=False
        )[0]
        self._parts = Partitions(self._engine, self._stage, trained, groups)
        self._originals = {}
        if self._compute != torch.float32:
            for name in self._named.keys() - trainable - held:
                _, length = self._share(name)
                self._originals[name] = torch.empty(length, device=self._home)

    def _destroy(self) -> None:
        """The old engine goes before the new one takes memory."""
        if self._engine is not None:
            self._engine.destroy()
        named = self._named
        self._engine, self._named, self._originals = None, {}, {}
        self.built = None  # type: ignore[assignment]
        if hasattr(self, "_parts"):
            self._parts.free(named.values())
            del self._parts, named
        leave_secondary_group()
        collect_everything()
        self._swapping.remove_folders()

    def close(self) -> None:
        self._swapping.remove_folders()

    def _bytes_to_swap(self, trainable: set[str]) -> tuple[int, int]:
        """Of this rank, at most: masters with their state, and what forward reads."""
        shares = {name: -(-math.prod(info.shape) // self.world.size) for name, info in self._infos.items()}
        masters = sum(4 * (1 + len(self.state_keys(name))) * shares[name] for name in trainable)
        return masters, self._compute.itemsize * sum(shares.values())

    @property
    def _home(self) -> torch.device:
        """Where parameters rest."""
        return torch.device("cpu") if self.config.parallel.cpu_offload or self._swapping.sections else self.device

    def _allocate(self, trainable: set[str]) -> Model:
        """The model with memory but without values: whole, or at stage 3 cut module by module. Then no rank holds more
        than one module of it whole."""
        with torch.device("meta"):
            built = build_model(self.config.model)
        model = built.module
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
        made: dict[int, nn.Parameter] = {}  # tied ones once
        cut: nn.Parameter | None = None
        for module in model.modules():
            for name, old in module._parameters.items():
                if old is not None:
                    if id(old) not in made:
                        empty = torch.empty(old.shape, dtype=self._compute, device=self.device)
                        made[id(old)] = nn.Parameter(empty, requires_grad=old.requires_grad)
                    module._parameters[name] = made[id(old)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=self.device)
            own = list(module.parameters(recurse=False))
            if own and self._stage == 3:
                partition_module(module, self._settings, cut)
                cut = own[0]
        return built

    def _make_leaves(self) -> None:
        """Stage 3 gathers by hooks, on which a graph breaks, and whose collectives selective checkpointing would take
        for the block's own. As a leaf a block is gathered at once, by hooks around its forward, and has none inside."""
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(self.model, [type(self.built.blocks[0])])
        for block in self.built.blocks:
            if any(p.requires_grad for p in block.parameters()):
                block.register_forward_pre_hook(_with_gradient)

    def _compile(self) -> None:
        if self._stage < 3:
            for block in self.built.blocks:
                block.compile(fullgraph=True)
            return
        for block in self.built.blocks:  # the forward alone: the hooks of stage 3 stand around it
            block.forward = torch.compile(block.forward, fullgraph=True)

    def _optimizer(
        self, trained: Mapping[str, nn.Parameter], counts: Mapping[str, int]
    ) -> tuple[torch.optim.Optimizer, list[list[str]]]:
        """Our optimizer over the model's parameters, which DeepSpeed will replace by flat ones, and the names in each
        group. A flat tensor has one step count and has state as a whole: so a group for each count there is."""
        # Who decays is decided by dimensions, which a parameter that stage 3 has cut does not show.
        stand_ins = {name: nn.Parameter(torch.empty((1,) * len(self._infos[name].shape))) for name in trained}
        (optimizer,) = build_optimizers(self.config.optim, self.built, stand_ins)
        names = {id(parameter): name for name, parameter in stand_ins.items()}
        groups, found = [], []
        for group in optimizer.param_groups:
            by_count: dict[int | None, list[str]] = {}
            for name in (names[id(parameter)] for parameter in group["params"]):
                by_count.setdefault(counts.get(name), []).append(name)
            for members in by_count.values():
                groups.append({**group, "params": [trained[name] for name in members]})
                found.append(members)
        optimizer.param_groups[:] = groups
        return optimizer, found

    # ---- parameters -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, seed: int, names: Iterable[str] | None = None) -> None:
        every = [*self._infos, *self._buffer_infos]
        for name in every if names is None else names:
            shape = (self._infos | self._buffer_infos)[name].shape
            # Drawn whole and cut, so that the values are those of every other engine, layout and world size.
            whole = torch.empty(shape, dtype=torch.float32, device=self.device)
            self.built.initialise(name, whole, generator(self.device, seed, "init", name))
            if name in self._buffer_infos:
                self._buffers()[name].copy_(whole)
                continue
            for start, local in self._places(name):
                local.copy_(whole.view(-1)[start : start + len(local)])
        self._parts.copy_to_compute()

    def _places(self, name: str) -> list[tuple[int, torch.Tensor]]:
        """(start, elements) of each flat range in which this rank keeps values of a parameter."""
        if name in self._parts.fragments:
            fragment = self._parts.fragments[name]
            return [(fragment.start, fragment.of(self._parts.flat(fragment.flat)))]
        places = [self._parts.frozen(self._named[name])]
        if name in self._originals:
            places.append((self._share(name)[0], self._originals[name]))
        return places

    def _share(self, name: str) -> tuple[int, int]:
        return share_of(math.prod(self._infos[name].shape), self.world.rank, self.world.size)

    def trainable(self) -> set[str]:
        return {name for name, p in self._named.items() if p.requires_grad}

    # ---- one update -------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Batch, scale: Callable[[], torch.Tensor], last: bool) -> torch.Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        total, sums = self._sums(self._engine, batch)
        # DeepSpeed averages over the ranks at every stage: undone by this factor.
        self._engine.backward(self._weighted(total, scale() * self.world.size, sums), scale_wrt_gas=False)
        return sums

    def update(self, lr_factor: float, clip: float | None) -> torch.Tensor:
        self._engine.optimizer.clip_grad = clip or 0.0
        for group in self._parts.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        self._parts.fill_gradients()
        self._engine.step()
        self._parts.clear()
        norm = float(self._engine.get_global_grad_norm())  # DeepSpeed waits for the device to decide what to skip
        return from_host([norm if math.isfinite(norm) else math.nan], self.device)[0]

    def gradients(self) -> dict[str, torch.Tensor]:
        found = {name: self._parts.gradient(name) for name in self._parts.fragments}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def evaluate(self, batch: Batch) -> torch.Tensor:
        with self._evaluating():
            return self._sums(self._engine, batch)[1]

    def call(self, function: Callable[[Callable[..., Any]], T]) -> T:
        with self._evaluating():
            return function(self._engine)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pieces(self) -> list[Piece]:
        found = []
        for name, info in self._infos.items():
            fragment = self._parts.fragments.get(name)
            if fragment is None:
                found.append(self._frozen_piece(name))
                continue
            flat, state = self._parts.flat(fragment.flat), self._parts.state(fragment.flat)
            found.append(Piece(name, "model", fragment.of(flat), info.shape, (), (), start=fragment.start))
            for key in self.state_keys(name):
                if key in state:
                    part = fragment.of(state[key])
                    found.append(Piece(f"{name}.{key}", "optim", part, info.shape, (), (), start=fragment.start))
        for name, buffer in self._buffers().items():
            box = (0,) * buffer.ndim, tuple(buffer.shape)
            found.append(Piece(name, "model", buffer, box[1], *box, self.world.rank, self.world.size))
        return found

    def _frozen_piece(self, name: str) -> Piece:
        """This rank's share of what is frozen: of the original, or of the copy that forward reads."""
        start, length = self._share(name)
        here, tensor = self._parts.frozen(self._named[name])
        tensor = self._originals.get(name, tensor[start - here : start - here + length])
        original = tensor.dtype == self._infos[name].dtype
        return Piece(name, "frozen", tensor, self._infos[name].shape, (), (), start=start, original=original)

    def flops(self, example: Batch) -> float:
        with torch.device("meta"):
            built = build_model(self.config.model)  # stage 3 leaves nothing of a parameter's size in the real one
        for name, parameter in built.module.named_parameters():
            parameter.requires_grad_(self._named[name].requires_grad)
        return built.flops(example.tensors)

    def step_counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for number, names in enumerate(self._parts.names):
            state = self._parts.state(number)
            if "step" in state:
                counts |= dict.fromkeys(names, int(state["step"]))
        return counts

    @torch.no_grad()
    def load(self, loading: Loading) -> None:
        self._parts.forget_state()  # of a checkpoint that proved bad halfway
        for name, info in self._infos.items():
            for start, local in self._places(name):
                loading.want_range(name, info.shape, start, local)
        for name, buffer in self._buffers().items():
            loading.want(name, (0,) * buffer.ndim, tuple(buffer.shape), buffer)
        for name, fragment in self._parts.fragments.items():
            self._want_state(loading, name, fragment)
        loading.read()

    def _want_state(self, loading: Loading, name: str, fragment: Fragment) -> None:
        state, shape = self._parts.state(fragment.flat), self._infos[name].shape
        for key in self.state_keys(name):
            if loading.has(f"{name}.{key}"):
                if key not in state:
                    state[key] = self._parts.add_state(fragment.flat, key)
                loading.want_range(f"{name}.{key}", shape, fragment.start, fragment.of(state[key]))
        if state and self.counts_steps(name):
            self._parts.set_count(fragment.flat, loading.count(name))

    def after_load(self) -> None:
        self._parts.copy_to_compute()


def _with_gradient(block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let the gradient reach a leaf's input, even if nothing below trains: else DeepSpeed's hook, which reduces the
    leaf's gradients, runs before they are there."""
    x, *others = arguments
    if not torch.is_grad_enabled() or x.requires_grad:
        return None
    return (x.detach().requires_grad_(), *others)


def _start_deepspeed(world: World) -> None:
    """Import it quietly, on our device, over our process group; one process gets a group of its own."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # else it guesses, and says so
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    # of calls that it makes at every step
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)

    if not dist.is_initialized():
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})  # it reads them
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    # A short cut for CPU ranks of one host, which is not needed. The first start compiles it behind a lock. If that
    # start is killed, every later one waits for the lock. Nothing public declines it: it is taken wherever this table
    # has it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
