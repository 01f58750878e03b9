"""What a run prints about itself before its first step and after its last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from configs.config import Config
from configs.schema.model import DecoderSection, ModelSection
from trainer.engines.base import Engine
from trainer.host.console import duration, gib, si
from trainer.life.attempts import Attempt, End
from trainer.life.layout import resolve
from trainer.ranks.world import World


@dataclass(frozen=True)
class Size:
    """The size of a sample: its cost in `unit` (tokens or samples), and the FLOPs per unit, forward and backward."""

    unit: str
    cost: int
    flops: float


def start_lines(
    config: Config,
    world: World,
    engine: Engine,
    size: Size,
    states: Mapping[str, int],
    data: Sequence[str],
    begins: str,
) -> list[str]:
    """Model, parameters, layout, tokens per step, bytes per rank, data, and where the run begins. `states`: how many
    tensors the optimizer keeps for a parameter."""
    infos, trainable = engine.parameters(), engine.trainable()
    counts = {name: _numel(info.shape) for name, info in infos.items()}
    total, trained = sum(counts.values()), sum(counts[n] for n in trainable)
    return [
        f"model     {_model(config.model)}",
        f"params    {si(total)}, {trained / total:.1%} trained; {si(size.flops)}FLOP per {size.unit.removesuffix('s')}",
        *_group_table(engine, states, counts),
        f"layout    {_layout(config, world)}",
        f"step      {_step(config, size)}",
        *(f"data      {line}" for line in data),
        f"begins    {begins}",
    ]


def _model(m: ModelSection) -> str:
    if isinstance(m, DecoderSection):
        return f"{m.name}: {m.layers} blocks of width {m.dim}, {m.heads} heads, vocabulary {m.vocab_size}"
    return f"{m.name}: " + ", ".join(f"{key} {value}" for key, value in m if key != "name")


def _step(config: Config, size: Size) -> str:
    batch, steps = config.train.global_batch, config.train.steps
    if size.unit == "samples":
        return f"{batch} samples; {steps} steps, {si(batch * steps)} samples in all"
    tokens = batch * size.cost
    return f"{batch} samples, {si(tokens)} tokens; {steps} steps, {si(tokens * steps)} tokens in all"


def _group_table(engine: Engine, states: Mapping[str, int], counts: dict[str, int]) -> list[str]:
    """A line per group of parameters: how many, how many train, and rank 0's bytes of weights, gradients and state."""
    local = {piece.key: piece for piece in engine.pieces() if piece.group != "optim"}
    trainable = engine.trainable()
    groups: dict[str, list[str]] = {}
    for name in counts:
        groups.setdefault(name.split(".")[0], []).append(name)
    lines = []
    for group, names in groups.items():
        held = sum(local[n].nbytes * (1 + (n in trainable) + states.get(n, 0)) for n in names)
        trained = sum(counts[n] for n in names if n in trainable)
        lines.append(
            f"  {group:<8}{si(sum(counts[n] for n in names)):>8}, {si(trained):>7} trained, {gib(held)} per rank"
        )
    return lines


def _layout(config: Config, world: World) -> str:
    p, precision = config.parallel, config.precision
    kind = "one process"
    if world.size > 1:
        layout = resolve(p, world.size)
        sizes, names = f"{layout.replicate} x {layout.shard}", "replicate x shard"
        if layout.tensor > 1:
            sizes, names = f"{sizes} x {layout.tensor}", f"{names} x tensor"
        kind = f"{sizes} ({names}) on {world.size} ranks"
    extras = [f"{precision.compute} compute, {precision.params} parameters", world.device.type]
    if world.device.type == "cuda" and precision.compute == "fp32":
        extras.append("products in TF32" if precision.tf32 else "products in full fp32 (precision.tf32 is faster)")
    extras += ["compiled"] if p.compile else []
    extras += [f"{p.activation_checkpoint} activation checkpointing"] if p.activation_checkpoint != "none" else []
    return f"{p.engine}, {kind}; " + ", ".join(extras)


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


def end_lines(config: Config, attempt: Attempt, end: End, seconds: float) -> list[str]:
    """How the run ended, where its files are, and what to type next."""
    folder = attempt.folder
    told = {
        "finished": f"finished at step {end.step}",
        "stopped": f"stopped at step {end.step} ({end.cause})",
        "failed": f"failed at step {end.step} ({end.cause})",
    }[end.reason]
    lines = [
        f"{told}; {duration(seconds)} in this attempt",
        f"  checkpoint  {folder.checkpoints / end.checkpoint if end.checkpoint else 'none'}",
        f"  metrics     {folder.metrics}" + (f", tensorboard --logdir {folder.root}" if config.run.tensorboard else ""),
        f"  log         {attempt.path}",
    ]
    if end.reason == "stopped":
        lines.append("to go on: the same command again")
    elif end.reason == "finished":
        longer = config.train.steps * 2
        lines.append(f"to train longer: the same command with train.steps={longer}")
    return lines
