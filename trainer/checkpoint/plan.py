"""What would be loaded into what, decided and shown before a single tensor is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from configs.errors import UserError
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.pieces import DTYPE_NAMES, GROUPS, Group, Ints

_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Plan:
    """Tensors by how they fit: `matched` load bit for bit, each other kind is a difference and one line per tensor."""

    source: str
    matched: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)
    dtype_changed: dict[str, str] = field(default_factory=dict)

    def differences(self) -> dict[str, dict[str, str]]:
        """Kind of difference -> tensors -> what differs; only the kinds that occur."""
        kinds = {
            "missing in the checkpoint": self.missing,
            "not wanted here": self.unexpected,
            "of another shape": self.reshaped,
            "of another dtype": self.dtype_changed,
        }
        return {kind: tensors for kind, tensors in kinds.items() if tensors}

    def summary(self) -> list[str]:
        """A few lines for a person."""
        lines = [f"{len(self.matched)} tensors match {self.source}"]
        return lines + [f"{len(tensors)} {kind}: {_some(tensors)}" for kind, tensors in self.differences().items()]

    def refuse(self) -> None:
        """Raise UserError, naming up to five tensors per kind, unless everything matches."""
        found = self.differences()
        if found:
            kinds = "; ".join(f"{len(tensors)} {kind}: {_some(tensors)}" for kind, tensors in found.items())
            raise UserError(f"{self.source} does not fit this model: {kinds}")


def plan(
    manifest: Manifest,
    wanted: Mapping[str, tuple[Ints, torch.dtype]],
    groups: Iterable[Group] = GROUPS,
    source: str | None = None,
) -> Plan:
    """Compare a checkpoint with what is wanted, by name. Stored tensors of other groups than `groups` are not asked for
    (weights only: "model" and "frozen"). A wanted tensor may go by another name of a tied one."""
    result = Plan(source or f"the checkpoint of step {manifest.step}")
    asked = set(groups)
    for key, (shape, dtype) in sorted(wanted.items()):
        name = manifest.name_of(key)
        if name not in manifest.tensors or manifest.tensors[name].group not in asked:
            result.missing[key] = f"{list(shape)}"
        elif manifest.shape_of(key) != tuple(shape):
            result.reshaped[key] = f"{list(manifest.shape_of(key))} stored, {list(shape)} wanted"
        elif manifest.dtype_of(key) != dtype:
            result.dtype_changed[key] = f"{manifest.tensors[name].dtype} stored, {DTYPE_NAMES[dtype]} wanted"
        else:
            result.matched.append(key)
    named = {manifest.name_of(key) for key in wanted}
    for key, tensor in sorted(manifest.tensors.items()):
        if tensor.group in asked and key not in named:
            result.unexpected[key] = f"{list(manifest.shape_of(key))}"
    return result


def _some(tensors: dict[str, str]) -> str:
    shown = [f"{key} ({what})" for key, what in list(tensors.items())[:_NAMED_AT_MOST]]
    more = len(tensors) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
