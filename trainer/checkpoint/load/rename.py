"""Names in a checkpoint that differ from the names here: `transformer.h.*: blocks.*`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from configs.errors import UserError


def rename_all(rules: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Name there -> name here, for all names. The first rule that matches a name applies. Each `*` of the rule stands
    for the same `*` in the new name. Raises UserError for a rule that matches nothing or cannot be applied, and when
    two tensors would get one name."""
    compiled = [_Rule(old, new) for old, new in rules.items()]
    renamed: dict[str, str] = {}
    for name in names:
        rule = next((rule for rule in compiled if rule.pattern.fullmatch(name)), None)
        renamed[name] = rule.apply(name) if rule else name
    for rule in compiled:
        if not rule.used:
            raise UserError(f"start.rename: {rule.old!r} matches no tensor of the checkpoint")
    origin: dict[str, str] = {}
    for name, new in renamed.items():
        if new in origin:
            raise UserError(f"start.rename: {origin[new]} and {name} would both be {new}")
        origin[new] = name
    return renamed


class _Rule:
    def __init__(self, old: str, new: str) -> None:
        if old.count("*") != new.count("*"):
            raise UserError(f"start.rename: {old!r} and {new!r} need the same number of *")
        self.old, self.new, self.used = old, new, False
        self.pattern = re.compile("(.*)".join(re.escape(part) for part in old.split("*")))

    def apply(self, name: str) -> str:
        self.used = True
        found = self.pattern.fullmatch(name)
        assert found is not None
        first, *rest = self.new.split("*")
        return first + "".join(group + part for group, part in zip(found.groups(), rest, strict=True))
