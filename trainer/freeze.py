"""Which parameters train: patterns over parameter names, and ties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from configs.errors import UserError
from configs.schema.freeze import FreezeChange, FreezeSection


def choose_trainable(freeze: FreezeSection, step: int, names: Iterable[str], aliases: Mapping[str, str]) -> set[str]:
    """Names that train in the updates after `step`: all, but for what `frozen` matches and `trainable` does not.

    Freezing one name of a tied pair freezes both, under the first name. Raises UserError for a pattern that matches
    nothing and when nothing is left to train.
    """
    change = next((c for c in reversed(freeze.schedule) if c.step <= step), None)
    if change is None:
        return _choose(freeze, "freeze", names, aliases)
    return _choose(change, f"freeze.schedule, step {change.step}", names, aliases)


def check_schedule(freeze: FreezeSection, names: Iterable[str], aliases: Mapping[str, str]) -> None:
    """Raise UserError now for what the beginning, or a change at a later step, would raise in the night."""
    every = list(names)
    for step in (0, *(change.step for change in freeze.schedule)):
        choose_trainable(freeze, step, every, aliases)


def _choose(
    patterns: FreezeSection | FreezeChange, where: str, names: Iterable[str], aliases: Mapping[str, str]
) -> set[str]:
    first_name = {name: name for name in names} | dict(aliases)

    def matches(key: str, globs: list[str]) -> set[str]:
        found: set[str] = set()
        for pattern in globs:
            hits = {first_name[n] for n in first_name if fnmatchcase(n, pattern)}
            if not hits:
                raise UserError(
                    f"{where}.{key}: {pattern!r} matches no parameter; "
                    f"names look like {', '.join(list(first_name)[:3])}"
                )
            found |= hits
        return found

    frozen = matches("frozen", patterns.frozen) - matches("trainable", patterns.trainable)
    trainable = set(first_name.values()) - frozen
    if not trainable:
        raise UserError(f"{where}.frozen: every parameter is frozen, nothing is left to train")
    return trainable
