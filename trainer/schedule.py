"""The learning rate as a pure function of the step, and numbers that do not fit the length of the run. No torch."""

from __future__ import annotations

import math

from configs.config import Config
from configs.errors import UserError
from configs.schema.optim import OptimSection


def lr_factor(optim: OptimSection, step: int, last_step: int) -> float:
    """Learning rate of the update that makes `step` (1-based), relative to the peak.

    Linear warm-up to 1 at `warmup_steps`, then the schedule down to `final_lr_ratio` at `last_step`.
    """
    if step <= optim.warmup_steps:
        return step / optim.warmup_steps
    low = optim.final_lr_ratio
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "wsd":
        progress = 1 - (last_step - step) / optim.decay_steps
        return 1.0 - (1.0 - low) * min(max(progress, 0.0), 1.0)
    progress = min((step - optim.warmup_steps) / max(last_step - optim.warmup_steps, 1), 1.0)
    if optim.schedule == "linear":
        return 1.0 - (1.0 - low) * progress
    return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))


def check_rates(config: Config) -> None:
    """Raise UserError for a schedule that does not fit into the run, and say what its rate would do."""
    optim, steps = config.optim, config.train.steps
    both = optim.warmup_steps + optim.decay_steps
    if optim.schedule == "wsd" and 0 < steps < both:
        if optim.warmup_steps >= steps:  # the run ends in its warm-up
            effect = "the decay would never come"
        elif optim.warmup_steps:  # which climbs to the peak when the decay has already begun
            effect = "the rate would drop at once where the warm-up ends"
        else:  # the decay is longer than the run
            effect = "the rate would begin below its peak"
        raise UserError(
            f"optim.schedule wsd: optim.warmup_steps {optim.warmup_steps} and optim.decay_steps {optim.decay_steps} "
            f"need {both} steps, train.steps is {steps}: {effect}\n"
            f"use train.steps={both}, or lower optim.warmup_steps or optim.decay_steps; "
            "for a trial: optim.schedule=constant"
        )


def remarks(config: Config) -> list[str]:
    """Lines about what the config asks for and a run of this length never reaches. No mistake: trial runs are short."""
    steps, found = config.train.steps, []
    if 0 < steps < config.optim.warmup_steps:
        found.append(
            f"optim.warmup_steps {config.optim.warmup_steps} is more than train.steps {steps}: "
            f"the learning rate ends at {steps / config.optim.warmup_steps:.2%} of its peak"
        )
    late = [change.step for change in config.freeze.schedule if 0 < steps <= change.step]
    if late:
        found.append(f"freeze.schedule: train.steps is {steps}, so the change after step {late[0]} never comes")
    profile = config.monitor.profile_steps
    if profile is not None and 0 < steps < profile[0]:
        found.append(f"monitor.profile_steps: train.steps is {steps}, so step {profile[0]} is never traced")
    return found


def rate_change(config: Config, old_steps: int, step: int) -> str:
    """A line that says how a new train.steps changes the learning rate of the update after `step`."""
    optim, steps = config.optim, config.train.steps
    old, new = (optim.lr * lr_factor(optim, step + 1, last) for last in (old_steps, steps))
    effect = f"stays {new:.3g}" if math.isclose(old, new, rel_tol=1e-9) else f"goes from {old:.3g} to {new:.3g}"
    return f"train.steps {old_steps} -> {steps}: the learning rate of step {step + 1} {effect} ({optim.schedule})"
