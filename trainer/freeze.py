"""Which parameters train: patterns over parameter names, and ties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from configs.errors import UserError
from configs.schema import FreezeSection


def choose_trainable(freeze: FreezeSection, names: Iterable[str], aliases: Mapping[str, str]) -> set[str]:
    """Names that train under `freeze`: all, but for what `frozen` matches and `trainable` does not.

    Freezing one name of a tied pair freezes both, under the first name. Raises UserError for a pattern that matches
    nothing and when nothing is left to train.
    """
    first_name = {name: name for name in names} | dict(aliases)

    def matches(key: str, patterns: list[str]) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            hits = {first_name[n] for n in first_name if fnmatchcase(n, pattern)}
            if not hits:
                raise UserError(
                    f"freeze.{key}: {pattern!r} matches no parameter; names look like {', '.join(list(first_name)[:3])}"
                )
            found |= hits
        return found

    frozen = matches("frozen", freeze.frozen) - matches("trainable", freeze.trainable)
    trainable = set(first_name.values()) - frozen
    if not trainable:
        raise UserError("freeze.frozen: every parameter is frozen, nothing is left to train")
    return trainable
