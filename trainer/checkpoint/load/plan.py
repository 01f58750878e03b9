"""What would be loaded into what, decided and shown before any tensor is changed.

Everything in a checkpoint ends in exactly one place. It is read into memory, or carried over from file to file (what is
frozen now, with its optimizer state), or it is a difference. Differences are refused unless the config admits them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from configs.errors import UserError
from configs.schema.start import AllowSection, StartSection
from trainer.checkpoint.format.boxes import Ints
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.format.pieces import DTYPE_NAMES, DTYPES
from trainer.checkpoint.load.rename import rename_all

_NAMED_AT_MOST = 3
Lines = dict[str, str]  # a tensor's name -> a remark about it


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a checkpoint: its global shape and stored dtype."""

    shape: Ints
    dtype: torch.dtype


@dataclass(frozen=True)
class Target:
    """What a run wants to fill. `tensors`: parameters and buffers. `state`: for each parameter that trains, the names
    of the optimizer's tensors. `counted`: the parameters whose updates the optimizer counts."""

    tensors: Mapping[str, TensorInfo]
    buffers: frozenset[str] = frozenset()
    state: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    counted: frozenset[str] = frozenset()


@dataclass
class Plan:
    """`read` and `carried` map keys here to keys in the checkpoint. For a key in `partial` only the part within
    both shapes is read. Names in `fresh` get initial values first. Names in `begins` have an optimizer that counts
    from 0."""

    source: str
    step: int
    everything: bool
    read: dict[str, str] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)
    fresh: set[str] = field(default_factory=set)
    begins: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Lines] = field(default_factory=dict)
    refused: dict[str, Lines] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """A short table of the plan for a person."""
        rows = [("read", f"{len(self.read)} tensors")]
        if self.carried:
            rows.append(("carried", f"{len(self.carried)} tensors stay in files: what is frozen, and its state"))
        if self.begins:
            rows.append(("at step 0", f"{len(self.begins)} newly trained: {_some(dict.fromkeys(self.begins, ''))}"))
        rows += [(kind, f"{len(names)}: {_some(names)}") for kind, names in self.notes.items()]
        what = "everything" if self.everything else "weights only"
        return [f"loading   {self.source} (step {self.step}, {what})", *(f"  {a:<12}{b}" for a, b in rows)]

    def refuse(self) -> None:
        """Raise UserError, with some names for each kind of difference, unless every difference was admitted."""
        if self.refused:
            kinds = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in self.refused.items())
            keys = ", ".join(f"start.allow.{kind}" for kind in self.refused if kind in AllowSection.model_fields)
            way = f"\nif that is wanted, name the parameters in {keys}" if keys else ""
            raise UserError(f"{self.source} does not fit this model: {kinds}{way}")


def plan(
    manifest: Manifest, target: Target, everything: bool, start: StartSection | None = None, source: str | None = None
) -> Plan:
    """Compare a checkpoint with what is wanted, by name.

    `start` holds the renames and the admitted differences; None admits none. Without `everything` no optimizer state is
    loaded. Raises UserError for a pattern of `start` that matches nothing. Other differences go into the result, for
    `refuse`."""
    return _Planner(manifest, target, everything, start or StartSection(), source).make()


class _Planner:
    def __init__(
        self, manifest: Manifest, target: Target, everything: bool, start: StartSection, source: str | None
    ) -> None:
        self.manifest, self.target, self.allow = manifest, target, start.allow
        self.plan = Plan(source or f"the checkpoint of step {manifest.step}", manifest.step, everything)
        self.used: dict[str, set[str]] = {kind: set() for kind in AllowSection.model_fields}
        weights = [key for key, tensor in manifest.tensors.items() if tensor.group != "optim"]
        self.here = rename_all(start.rename, [*weights, *manifest.aliases])  # name there -> name here
        # A tied tensor may have each of its names here; the name that it is stored under wins.
        self.there = {self.here[alias]: first for alias, first in manifest.aliases.items()}
        self.there |= {self.here[name]: name for name in weights}
        self.states: dict[str, list[str]] = {name: [] for name in weights}
        for key, tensor in manifest.tensors.items():
            if tensor.group == "optim":
                name, _, state = key.rpartition(".")
                self.states.setdefault(name, []).append(state)

    def make(self) -> Plan:
        for name, info in self.target.tensors.items():
            self._weight(name, info)
        wanted = {self.there[name] for name in self.target.tensors if name in self.there}
        for stored in sorted(self.states.keys() - wanted):
            name = self.here.get(stored, stored)
            self._differs(
                "unexpected", name, name, f"{list(self.manifest.shape_of(stored))}" if stored in self.here else ""
            )
        for kind in self.used:
            for pattern in getattr(self.allow, kind):
                if pattern not in self.used[kind]:
                    raise UserError(
                        f"start.allow.{kind}: {pattern!r} matches nothing that is {kind} in {self.plan.source}"
                    )
        return self.plan

    def _weight(self, name: str, info: TensorInfo) -> None:
        stored = self.there.get(name)
        if stored is None:
            self.plan.fresh.add(name)
            self._differs("missing", name, name, f"{list(info.shape)}")
        elif self._admitted("replaced", name):
            self.plan.fresh.add(name)
            self._note("replaced", name, "begins with initial values")
        else:
            self._note_freezing(name, stored)
            if self.manifest.shape_of(stored) == info.shape:
                self._same_shape(name, stored, info)
            else:
                self._other_shape(name, stored, info)
            return
        if name in self.target.state and self.plan.everything:
            self.plan.begins.append(name)

    def _same_shape(self, name: str, stored: str, info: TensorInfo) -> None:
        self.plan.read[name] = stored
        if name in self.target.state or name in self.target.buffers:
            self._check_dtype(name, name, stored, info.dtype)
            self._state(name, stored, info)
            return
        # A frozen tensor's original is carried over unchanged, whatever the number format in memory.
        self.plan.carried[name] = stored
        if self.plan.everything:
            for state in self.states[stored]:
                self.plan.carried[f"{name}.{state}"] = f"{stored}.{state}"
            if stored in self.manifest.step_counts:
                self.plan.counts[name] = self.manifest.step_counts[stored]

    def _other_shape(self, name: str, stored: str, info: TensorInfo) -> None:
        shape = self.manifest.shape_of(stored)
        self._differs("reshaped", name, name, f"{list(shape)} there, {list(info.shape)} here")
        self.plan.fresh.add(name)
        if len(shape) != len(info.shape):
            self._refuse("of another number of dimensions", name, f"{list(shape)} there, {list(info.shape)} here")
            return
        self.plan.read[name] = stored
        self.plan.partial.add(name)
        self._check_dtype(name, name, stored, info.dtype)
        self._state(name, stored, info)
        if name not in self.target.state and self.plan.everything and self.states[stored]:
            self._note("left out", name, "optimizer state of a frozen parameter of another shape")

    def _state(self, name: str, stored: str, info: TensorInfo) -> None:
        """Plan the optimizer state of a parameter that trains here."""
        wanted = self.target.state.get(name, ())
        if not self.plan.everything or name not in self.target.state:
            return
        present = self.states[stored]
        if not present and stored not in self.manifest.step_counts and self._never_updated(stored):
            if wanted:
                self.plan.begins.append(name)
            return
        for state in wanted:
            key = f"{name}.{state}"
            if state in present:
                shapes = self.manifest.shape_of(f"{stored}.{state}"), self.manifest.shape_of(stored)
                if shapes[0] != shapes[1]:
                    self._refuse("of another shape than its parameter", key, f"{list(shapes[0])}, {list(shapes[1])}")
                self.plan.read[key] = f"{stored}.{state}"
                self._check_dtype(name, key, f"{stored}.{state}", info.dtype)
                if name in self.plan.partial:
                    self.plan.partial.add(key)
            else:
                self._differs("missing", name, key, "optimizer state")
        for state in sorted(set(present) - set(wanted)):
            self._differs("unexpected", name, f"{name}.{state}", "optimizer state")
        if name in self.target.counted:
            if stored in self.manifest.step_counts:
                self.plan.counts[name] = self.manifest.step_counts[stored]
            else:
                self._differs("missing", name, f"{name}.step", "the count of its updates")

    def _never_updated(self, stored: str) -> bool:
        """Whether a parameter without state never had any; else its state was lost."""
        nothing_at_all = not any(self.states.values())  # every update so far was skipped
        return nothing_at_all or stored in self.manifest.stateless or self.manifest.tensors[stored].group == "frozen"

    def _note_freezing(self, name: str, stored: str) -> None:
        was_frozen = self.manifest.tensors[stored].group == "frozen"
        trains = name in self.target.state
        if name not in self.target.buffers and was_frozen == trains:
            self._note("trains now" if trains else "frozen now", name, "")

    def _check_dtype(self, name: str, key: str, stored: str, wanted: torch.dtype) -> None:
        """Compare number formats. A wider one holds every number of a narrower one; the other way rounds."""
        dtype = DTYPES[self.manifest.dtype_of(stored)]
        words = f"{DTYPE_NAMES[dtype]} there, {DTYPE_NAMES[wanted]} here"
        if dtype == wanted:
            return
        exact = dtype.is_floating_point and wanted.is_floating_point and torch.promote_types(dtype, wanted) == wanted
        if exact:
            self._note("widened", key, words)
        else:
            self._differs("dtype", name, key, words)

    # ---- what is said and what is refused ---------------------------------------------------------------------------

    def _admitted(self, kind: str, name: str) -> bool:
        found = [pattern for pattern in getattr(self.allow, kind) if fnmatchcase(name, pattern)]
        self.used[kind].update(found)
        return bool(found)

    def _differs(self, kind: str, name: str, key: str, words: str) -> None:
        """Record a difference of tensor `key`, which belongs to parameter `name`."""
        if self._admitted(kind, name):
            self._note(kind, key, words)
        else:
            self._refuse(kind, key, words)

    def _note(self, kind: str, key: str, words: str) -> None:
        self.plan.notes.setdefault(kind, {})[key] = words

    def _refuse(self, kind: str, key: str, words: str) -> None:
        self.plan.refused.setdefault(kind, {})[key] = words


def _some(tensors: Mapping[str, str]) -> str:
    shown = [f"{key} ({what})" if what else key for key, what in list(tensors.items())[:_NAMED_AT_MOST]]
    more = len(tensors) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def frozen_in(manifest: Manifest) -> set[str]:
    """Names of the parameters that were frozen when the checkpoint was saved."""
    return {key for key, tensor in manifest.tensors.items() if tensor.group == "frozen"}


def some(names: Iterable[str]) -> str:
    """A few of many names."""
    return _some(dict.fromkeys(sorted(names), ""))
