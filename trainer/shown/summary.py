"""What a run says about itself before its first step and after its last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.begin import target_of
from trainer.host.console import duration, gib, si
from trainer.life.attempts import End
from trainer.life.layout import resolve

if TYPE_CHECKING:
    from trainer.run import Run


def say_start(run: Run) -> None:
    """Model, parameters, layout, tokens per step, bytes per rank, data, and where it begins."""
    config, world = run.config, run.world
    infos, trainable = run.engine.parameters(), run.engine.trainable()
    counts = {name: _numel(info.shape) for name, info in infos.items()}
    total, trained = sum(counts.values()), sum(counts[n] for n in trainable)
    tokens = config.train.global_batch * config.data.seq_len
    m = config.model
    lines = [
        f"model     {m.name}: {m.layers} blocks of width {m.dim}, {m.heads} heads, vocabulary {m.vocab_size}",
        f"params    {si(total)}, {trained / total:.1%} trained; {si(run.flops_per_token())}FLOP per token",
        *_group_table(run, counts, trainable),
        f"layout    {_layout(run)}",
        f"step      {config.train.global_batch} samples, {si(tokens)} tokens; {config.train.steps} steps, "
        f"{si(tokens * config.train.steps)} tokens in all",
        *(f"data      {line}" for line in run.prepared.describe(config)),
        f"begins    {run.origin}" + (f", step {run.progress.step}" if run.progress.step else ""),
        f"folder    {run.folder.root} (attempt {run.attempt.number}, rank 0 of {world.size} on {world.node})",
    ]
    run.console.say("\n".join(lines))


def _group_table(run: Run, counts: dict[str, int], trainable: set[str]) -> list[str]:
    """A line per group of parameters: how many, how many train, and rank 0's bytes of weights, gradients and state."""
    local = {piece.key: piece for piece in run.engine.pieces() if piece.group != "optim"}
    states = {name: len(keys) for name, keys in target_of(run, run.origin.trainable).state.items()}
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


def _layout(run: Run) -> str:
    config, world = run.config, run.world
    p, precision = config.parallel, config.precision
    kind = "one process"
    if world.size > 1:
        layout = resolve(p, world.size)
        sizes, names = f"{layout.replicate} x {layout.shard}", "replicate x shard"
        if layout.tensor > 1:
            sizes, names = f"{sizes} x {layout.tensor}", f"{names} x tensor"
        kind = f"{sizes} ({names}) on {world.size} ranks"
    extras = [f"{precision.compute} compute, {precision.params} parameters", world.device.type]
    extras += ["compiled"] if p.compile else []
    extras += [f"{p.activation_checkpoint} activation checkpointing"] if p.activation_checkpoint != "none" else []
    return f"{p.engine}, {kind}; " + ", ".join(extras)


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


def say_end(run: Run, end: End) -> None:
    """How it ended, where everything lies, what to type next."""
    run.console.end_live()
    told = {
        "finished": f"finished at step {end.step}",
        "stopped": f"stopped at step {end.step} ({end.cause})",
        "failed": f"failed at step {end.step} ({end.cause})",
    }[end.reason]
    root = run.folder.root
    lines = [
        f"{told}; {duration(run.seconds())} in this attempt",
        f"  checkpoint  {run.folder.checkpoints / end.checkpoint if end.checkpoint else 'none'}",
        f"  metrics     {run.folder.metrics}"
        + (f", tensorboard --logdir {root}" if run.config.run.tensorboard else ""),
        f"  log         {run.attempt.path}",
    ]
    if end.reason == "stopped":
        lines.append("to go on: the same command again")
    elif end.reason == "finished":
        longer = run.config.train.steps * 2
        lines.append(f"to train longer: the same command with train.steps={longer}")
    run.console.say("\n".join(lines))
