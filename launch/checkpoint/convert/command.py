"""`python -m launch checkpoint convert`."""

from __future__ import annotations

from pathlib import Path

from configs.errors import UserError
from launch.checkpoint.convert.convert import convert
from launch.checkpoint.convert.state import State
from launch.checkpoint.text import Progress
from launch.look.text import size_text
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.checkpoint.load.kinds import Kind, Target
from trainer.host.terminal import say


def convert_checkpoint(source: Path, target: Path, to: Target, kind: Kind | None, weights_only: bool) -> int:
    """Returns the exit code."""
    progress = Progress("converted", 0)

    def begin(state: State) -> None:
        progress.total = state.nbytes
        say(f"{state.path}: {state.kind}, step {state.step}, {_contents(state)}, {size_text(state.nbytes)}")

    try:
        done = convert(source, target, to, kind, weights_only, progress, begin)
    except BadCheckpoint as error:
        raise UserError(f"{error}; nothing was written") from None
    finally:
        progress.close()
    for name in done.left_out[:10]:
        say(f"left out: {name} (neither a tensor nor a plain value)")
    if len(done.left_out) > 10:
        say(f"left out: {len(done.left_out) - 10} more")
    speed = done.nbytes / max(done.seconds, 1e-9) / 1e9
    say(f"{done.target}: {done.target_kind}, written in {done.seconds:.1f} s ({speed:.2f} GB/s)")
    return 0


def _contents(state: State) -> str:
    """`12 parameters, 24 tensors of optimizer state`."""
    weights = len(state.parameters())
    tied = f" ({len(state.aliases)} tied)" if state.aliases else ""
    others = len(state.tensors) - weights
    return f"{weights} parameters{tied}, {others} tensors of optimizer state"
