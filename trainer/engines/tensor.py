"""Tensor parallelism: applies a model's plan to a group of ranks, before FSDP shards what is left on each.

Weights become DTensors over the group, so that FSDP, optimizers and checkpoints know what is where. Computing goes on
plain local tensors, with one collective wherever tokens are gathered or partial sums are added up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.nn import functional as F

from models import LossSums, Model, TensorPlan
from models.cross_entropy import Head, VocabularyPart, chunked_cross_entropy

_KNOWN = (nn.Linear, nn.RMSNorm, nn.LayerNorm, nn.Embedding, Head)
TOKENS = 1  # the dimension of the residual stream (B, T, dim) that is cut


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The part of the mesh that FSDP works on: (shard) or (replicate, shard)."""
    names = tuple(name for name in mesh.mesh_dim_names or () if name != "tensor")
    return mesh if len(names) == mesh.ndim else mesh[names]


def tensor_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The tensor groups of the mesh, if there are any."""
    return None if mesh is None or "tensor" not in (mesh.mesh_dim_names or ()) else mesh["tensor"]


def split_model(built: Model, mesh: DeviceMesh) -> None:
    """Cut the parameters of the model (on the meta device) over the ranks of a 1-D mesh, and make its modules compute
    with the parts. Parameter names stay, and so do the `forward` signatures."""
    model, plan = built.module, built.plan
    assert plan is not None  # a config with parallel.tensor > 1 is refused without one
    group = _Group(mesh)
    cut = _Cut(mesh)
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in modules:
        forward = _split_module(name, module, plan, group, cut)
        if forward is not None:
            if type(module) not in _KNOWN:  # a subclass may compute more, or use buffers
                raise ValueError(f"{name} is a {type(module).__name__}: nothing is known of how to split that")
            module.forward = forward
    left = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if left:
        raise ValueError(f"the tensor plan of {type(model).__name__} leaves out {', '.join(left)}")
    for name, module in modules:
        if _matches(name, plan.gathered):
            module.forward = _gathered(module.forward, group)
    modules[0][1].forward = _filled_up(model.forward, mesh.size(), plan.filled)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _split_module(
    name: str, module: nn.Module, plan: TensorPlan, group: _Group, cut: _Cut
) -> Callable[..., Any] | None:
    """Cut the module's own parameters; returns what it computes from now on, None when nothing changes."""
    if _matches(name, plan.columns):
        cut(module, weight=Shard(0), bias=Shard(0))
        return _columns(module)
    if _matches(name, plan.rows):
        cut(module, weight=Shard(1), bias=Replicate())
        return _rows(module, group)
    if _matches(name, plan.whole):
        cut(module, weight=Replicate(), bias=Replicate())
        return _norm(module)
    if _matches(name, plan.positions):
        cut(module, weight=Replicate())
        return _positions(module, group)
    if _matches(name, plan.vocabulary):
        cut(module, weight=Shard(0))
        return _head(module, group) if isinstance(module, Head) else _embedding(module, group)
    return None


@torch.no_grad()
def add_up_whole(gradients: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Add up the gradients of parameters that every rank of the group holds whole: each has that of its own tokens or
    heads. A collective, once a step.

    It comes after FSDP's sums, and adds in the order of the ranks: so all that hold such a parameter get the same bits.
    Reduced before, they drift apart, because FSDP adds in an order that depends on the place in a buffer.
    """
    own = [cast(DTensor, g).to_local() for g in gradients if cast(DTensor, g).placements[-1].is_replicate()]
    if not own:
        return
    flat = torch.cat([g.flatten() for g in own]).to(mesh.device_type)
    terms = [torch.empty_like(flat) for _ in range(mesh.size())]
    dist.all_gather(terms, flat, group=mesh.get_group())
    sums = torch.stack(terms).sum(0).split([g.numel() for g in own])
    torch._foreach_copy_(own, [total.view_as(g) for total, g in zip(sums, own, strict=True)])


class _Cut:
    """Replaces parameters by their parts, a tied one once."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.done: dict[nn.Parameter, nn.Parameter] = {}

    def __call__(self, module: nn.Module, **placements: Placement) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in self.done:
                part = nn.Parameter(self._part(parameter, placements[name]), parameter.requires_grad)
                self.done[parameter] = self.done[part] = part
            module.register_parameter(name, self.done[parameter])

    def _part(self, whole: Tensor, placement: Placement) -> DTensor:
        local = whole.detach()
        if isinstance(placement, Shard):
            # as DTensor cuts: ceil(n / ranks) to each, what is left to the last
            size = -(-whole.shape[placement.dim] // self.mesh.size())
            local = local.split(size, placement.dim)[self.mesh.get_local_rank()].contiguous()
        return DTensor.from_local(
            local, self.mesh, (placement,), run_check=False, shape=whole.shape, stride=whole.stride()
        )


class _AllTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        cut = DTensor.from_local(x, mesh, (Shard(TOKENS),), run_check=False)
        return cut.redistribute(placements=(Replicate(),)).to_local()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _OwnTokens.apply(grad, ctx.mesh), None


class _OwnTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        terms = DTensor.from_local(x, mesh, (Partial(),), run_check=False)
        return terms.redistribute(placements=(Shard(TOKENS),)).to_local()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllTokens.apply(grad, ctx.mesh), None


class _Group:
    """The collectives of a tensor group."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.rank, self.size = mesh, mesh.get_local_rank(), mesh.size()
        self._process_group = mesh.get_group()

    def all_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens -> all of them. Gradients are added up and cut."""
        return cast(Tensor, _AllTokens.apply(x, self.mesh))

    def own_tokens(self, x: Tensor) -> Tensor:
        """Terms of a sum over the ranks, of all tokens -> the sum, of this rank's tokens. Gradients are gathered."""
        return cast(Tensor, _OwnTokens.apply(x, self.mesh))

    def all_words(self, logits: Tensor, vocab_size: int) -> Tensor:
        """Logits of this rank's words -> of all. Without gradients."""
        shape = (*logits.shape[:-1], vocab_size)
        stride = torch.empty(shape, device="meta").stride()
        parts = DTensor.from_local(
            logits, self.mesh, (Shard(logits.ndim - 1),), run_check=False, shape=torch.Size(shape), stride=stride
        )
        return parts.full_tensor()

    def all_max(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self._process_group)
        return x

    def all_sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self._process_group)
        return x


def _local(parameter: Tensor | None) -> Any:
    """What this rank holds of a parameter, for computing. Of one that every rank holds whole the gradient is this
    rank's term of a sum, though it looks whole: `add_up_whole` adds them up."""
    return None if parameter is None else cast(DTensor, parameter).to_local()


# ---- what modules compute instead -----------------------------------------------------------------------------------


def _columns(module: nn.Module) -> Callable[[Tensor], Tensor]:
    assert isinstance(module, nn.Linear)
    return lambda x: F.linear(x, _local(module.weight), _local(module.bias))


def _rows(module: nn.Module, group: _Group) -> Callable[[Tensor], Tensor]:
    assert isinstance(module, nn.Linear)

    def forward(x: Tensor) -> Tensor:
        total = group.own_tokens(F.linear(x, _local(module.weight)))
        return total if module.bias is None else total + _local(module.bias)

    return forward


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(module, nn.LayerNorm):
        layer = module
        return lambda x: F.layer_norm(x, layer.normalized_shape, _local(layer.weight), _local(layer.bias), layer.eps)
    assert isinstance(module, nn.RMSNorm)
    rms = module
    return lambda x: F.rms_norm(x, rms.normalized_shape, _local(rms.weight), rms.eps)


def _positions(module: nn.Module, group: _Group) -> Callable[[Tensor], Tensor]:
    assert isinstance(module, nn.Embedding)
    return lambda positions: F.embedding(positions.chunk(group.size, dim=1)[group.rank], _local(module.weight))


def _embedding(module: nn.Module, group: _Group) -> Callable[[Tensor], Tensor]:
    assert isinstance(module, nn.Embedding)
    part = _vocabulary_part(module.weight, group)

    def forward(tokens: Tensor) -> Tensor:
        weight = _local(module.weight)
        rows, here = part.find(tokens, len(weight))
        return group.own_tokens(F.embedding(rows, weight).masked_fill(~here[..., None], 0))

    return forward


def _head(module: Head, group: _Group) -> Callable[..., Tensor | LossSums]:
    part = _vocabulary_part(module.weight, group)

    def forward(hidden: Tensor, targets: Tensor | None, z_loss: float, chunk_tokens: int) -> Tensor | LossSums:
        weight = _local(module.weight)
        if targets is None:
            return group.all_words(F.linear(hidden, weight), part.vocab_size)
        return chunked_cross_entropy(hidden, weight, targets, z_loss, chunk_tokens, part)

    return forward


def _vocabulary_part(weight: Tensor, group: _Group) -> VocabularyPart:
    vocab_size = weight.shape[0]
    return VocabularyPart(-(-vocab_size // group.size) * group.rank, vocab_size, group.all_max, group.all_sum)


def _gathered(forward: Callable[..., Any], group: _Group) -> Callable[..., Any]:
    return lambda x, *args: forward(group.all_tokens(x), *args)


def _filled_up(forward: Callable[..., Any], size: int, filled: Mapping[str, int]) -> Callable[..., Any]:
    """Fill the sequences up to a multiple of the ranks, so that every rank has equally many tokens. What is added
    stands last, where nothing sees it, and has no target."""
    signature = inspect.signature(forward)

    def longer(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        given = {name: arguments[name] for name in filled if arguments.get(name) is not None}
        seq_len = next(iter(given.values())).shape[1]
        missing = -seq_len % size
        for name, tensor in given.items() if missing else ():
            arguments[name] = F.pad(tensor, (0, missing), value=filled[name])
        out = forward(**arguments)
        return out[:, :seq_len] if isinstance(out, Tensor) else out

    return longer
