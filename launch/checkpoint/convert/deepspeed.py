"""A folder that DeepSpeed wrote under ZeRO 1, 2 or 3, as a source. DeepSpeed itself is not needed, and nothing is run.

    latest                                                             the newest checkpoint's name
    global_step500/mp_rank_00_model_states.pt                          stages 1, 2: weights as forward reads them
    global_step500/zero_pp_rank_3_mp_rank_00_model_states.pt           stage 3: a rank's part of the frozen parameters
    global_step500/[bf16_]zero_pp_rank_3_mp_rank_00_optim_states.pt    a rank's fp32 masters and optimizer state

Masters and state are flat tensors, one per parameter group and rank. Stages 1 and 2 put a group's parameters end to
end, and cut the whole into one equal part per rank. Stage 3 cuts each parameter, and puts a rank's parts end to end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from launch.checkpoint.convert.archive import Archive, ArchivedContent, Files
from launch.checkpoint.convert.names import add_value, is_content, leaves_of, whole_number
from launch.checkpoint.convert.state import Content, State, StateTensor
from launch.checkpoint.convert.torch_file import with_contents
from launch.checkpoint.convert.unpickle import Enumeration, Names, record_type, stand_in
from trainer.checkpoint.format.boxes import Ints
from trainer.checkpoint.load.kinds import deepspeed_states

MODEL = "mp_rank_00_model_states.pt"
_FILE = re.compile(r"(?:(?:bf16|fp16)_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")
_ELSEWHERE = {  # names of files that show a cut which is not ZeRO's
    "tensor parallel": re.compile(r"mp_rank_(?!00_)\d+_"),
    "pipeline": re.compile(r"^layer_\d+"),
    "mixture of experts": re.compile(r"expert_\d+"),
}
# The fields of a model's file that are read here. The others are plain values.
_READ = {"module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params"}
_STAGES = (("disabled", 0), ("optimizer_states", 1), ("gradients", 2), ("weights", 3), ("max_stage", 3))
_ALIGNED_ELEMENTS = 16  # the most padding before a parameter
_GAP_ELEMENTS = 1 << 16


def _names() -> Names:
    """The types of DeepSpeed that its files hold beside tensors."""
    scaler, fragment = "deepspeed.runtime.fp16.loss_scaler", "deepspeed.utils.tensor_fragment"
    names: Names = {(scaler, name): record_type(name) for name in ("LossScaler", "DynamicLossScaler")}
    names["deepspeed.runtime.zero.config", "ZeroStageEnum"] = Enumeration(_STAGES)
    names["builtins", "set"] = stand_in(list)  # up to 0.14 or so, a set held the names of buffers
    names[fragment, "fragment_address"] = record_type("fragment_address")
    names["argparse", "Namespace"] = record_type("Namespace")  # Megatron's arguments
    return names


@dataclass(frozen=True)
class _Place:
    """A range of a parameter, and where it lies in a rank's flat tensors."""

    start: int
    length: int
    rank: int
    offset: int


class _Flat:
    """A flat tensor whose ranges are read in ascending order. Padding between and after the ranges is read too: the
    checksum covers the whole storage."""

    def __init__(self, content: ArchivedContent) -> None:
        tensor, self.numel, self.dtype = content.tensor, prod(content.shape), content.dtype
        if tensor.stride not in ((), (1,)):
            raise ValueError("a flat tensor with gaps")
        whole = tensor.storage.nbytes // self.dtype.itemsize
        self._storage = ArchivedContent(content.archive, replace(tensor, offset=0, shape=(whole,), stride=(1,)))
        self._begin, self._whole = tensor.offset, whole
        self.end = 0  # the end of the last range that will be read
        self._done = 0

    def read(self, start: int, out: torch.Tensor) -> None:
        self._skip_to(self._begin + start)
        self._storage.read_range_into(self._begin + start, out)
        self._done = self._begin + start + out.numel()
        if start + out.numel() == self.end:
            self._skip_to(self._whole)

    def _skip_to(self, place: int) -> None:
        if 0 < place - self._done <= _GAP_ELEMENTS:
            self._storage.read_range_into(self._done, torch.empty(place - self._done, dtype=self.dtype))


@dataclass(frozen=True)
class _Scattered:
    """A tensor whose ranges lie on several ranks."""

    shape: Ints
    dtype: torch.dtype
    parts: list[tuple[_Place, _Flat]]

    def read_range_into(self, start: int, out: torch.Tensor) -> None:
        end = start + out.numel()
        for place, flat in self.parts:
            first, last = max(start, place.start), min(end, place.start + place.length)
            if first < last:
                flat.read(place.offset + first - place.start, out[first - start : last - start])


@dataclass
class _Rank:
    """A rank's file of optimizer state. `states`: per group, by name; `counts`: number of updates, per group."""

    where: str
    stage: int
    masters: list[_Flat]
    states: list[dict[str, _Flat]]
    counts: list[int | None]
    groups: list[dict[str, Any]]
    paddings: list[int]
    alignments: list[list[int]] | None
    ranks: int
    left_out: list[str] = field(default_factory=list)


class _Folder:
    """The opened files of a folder, checked against each other."""

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, Files(path)
        self.found: dict[tuple[str, int], str] = {}
        names = sorted(os.listdir(path))
        for what, pattern in _ELSEWHERE.items():
            other = next((name for name in deepspeed_states(set(names)) if pattern.search(name)), None)
            if other:
                raise UserError(f"{path / other}: cut in another way as well ({what}); only ZeRO's parts are read")
        for name in names:
            if match := _FILE.fullmatch(name):
                key = (match[2], int(match[1]))
                if key in self.found:
                    raise UserError(f"{path}: {self.found[key]} and {name} are of the same rank: of different runs")
                self.found[key] = name
        if ("optim", 0) not in self.found:
            raise UserError(f"{path}: zero_pp_rank_0_mp_rank_00_optim_states.pt is missing: not of ZeRO 1, 2 or 3")

    def rank(self, number: int) -> _Rank:
        where, root = self._open("optim", number)
        try:
            return _rank(where, root["optimizer_state_dict"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise UserError(f"{where}: not what a rank writes under ZeRO 1, 2 or 3") from None

    def model(self, number: int, stage: int) -> tuple[str, dict[str, Any]]:
        if stage == 3:
            return self._open("model", number)
        return self._read(MODEL)

    def check_complete(self, ranks: int, stage: int) -> None:
        """Raise UserError unless the folder has one file for each rank, and no other."""
        for what in ("optim", "model") if stage == 3 else ("optim",):
            numbers = {number for kind, number in self.found if kind == what}
            for number in sorted(set(range(ranks)) - numbers):
                name = self.found["optim", 0].replace("rank_0", f"rank_{number}", 1) if what == "optim" else None
                name = name or f"zero_pp_rank_{number}_{MODEL}"
                raise UserError(f"{self.path}: {name} is missing; {ranks} ranks wrote this checkpoint")
            for number in sorted(numbers - set(range(ranks))):
                name = self.found[what, number]
                raise UserError(f"{self.path / name}: {ranks} ranks wrote this checkpoint; it is of another one")

    def _open(self, kind: str, number: int) -> tuple[str, dict[str, Any]]:
        return self._read(self.found[kind, number])

    def _read(self, name: str) -> tuple[str, dict[str, Any]]:
        archive = Archive(self.files, name, 0, self.files.size(name), more=_names())
        root = with_contents(archive, archive.root)
        if not isinstance(root, dict):
            raise UserError(f"{archive.where}: it holds a {type(root).__name__}, not what DeepSpeed writes")
        return str(self.path / name), root


def _rank(where: str, told: dict[str, Any]) -> _Rank:
    """Raises KeyError, TypeError and the like where the file is not as DeepSpeed writes it."""
    if told.get("ds_zero_partition_groups"):
        raise UserError(f"{where}: experts are cut over groups of ranks of their own; only ZeRO's parts are read")
    # The optimizer that accumulates bf16 gradients in fp32 does not name its stage. It only has stage 1.
    stage = int(told.get("zero_stage", 1))
    masters = told["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
    base = told["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    count = told["partition_count"]
    paddings, alignments = told.get("group_paddings"), told.get("param_alignment_paddings")
    if isinstance(base, list):  # `elastic_checkpoint`
        base = {"state": dict(enumerate(base)), "param_groups": [{"params": [i]} for i in range(len(base))]}
    groups = base["param_groups"]
    order = [number for group in groups for number in group["params"]]
    found = _Rank(
        where,
        stage,
        [_Flat(master) for master in masters],
        [],
        [],
        groups,
        [int(padding) for padding in paddings or [0] * len(masters)],
        alignments and [[int(n) for n in alignment] for alignment in alignments],
        max(count) if isinstance(count, list | tuple) else int(count),
    )
    if len(order) != len(masters):
        raise ValueError("groups without masters")
    owners = {number: group for group in groups for number in group["params"]}
    for index, number in enumerate(order):
        state = base["state"].get(number, {})
        step = state.get("step", owners[number].get("step", told.get("base_optimizer_state_step")))
        found.counts.append(None if step is None else whole_number(step))
        flats = {key: value for key, value in state.items() if is_content(value) and len(value.shape) == 1}
        found.states.append({str(key): _Flat(value) for key, value in flats.items()})
        others = [key for key in state if key not in flats and key != "step" and state[key] is not None]
        found.left_out += [f"optimizer.state.{index}.{key}" for key in others]
    return found


def read_deepspeed(path: Path, weights_only: bool) -> State:
    """The state in a folder of DeepSpeed. Raises UserError when the folder is not whole or mixes several runs."""
    folder = _Folder(path)
    try:
        return _read(folder, weights_only)
    except BaseException:
        folder.files.close()
        raise


def _read(folder: _Folder, weights_only: bool) -> State:
    first = folder.rank(0)
    folder.check_complete(first.ranks, first.stage)
    ranks = [first, *(folder.rank(number) for number in range(1, first.ranks))]
    where, model = folder.model(0, first.stage)
    models = [model]
    if first.stage == 3:
        models += [folder.model(number, 3)[1] for number in range(1, first.ranks)]
    _check_alike(ranks, where, models)
    state = State("deepspeed", folder.path, close=folder.files.close)
    try:
        layout = _Layout(ranks, [dict(group) for group in model["param_shapes"]])
        _add_untrained(state, where, models, layout)
        _add_trained(state, layout, weights_only)
        state.facts |= {"step": int(model["global_steps"]), "buffers": sorted(model["buffer_names"])}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UserError(f"{where}: not what DeepSpeed writes under ZeRO {first.stage}") from None
    for leaf_path, leaf in leaves_of(where, {k: v for k, v in model.items() if k not in _READ and v is not None}):
        dotted = ".".join(map(str, leaf_path))
        if is_content(leaf):
            state.left_out.append(dotted)
        else:
            add_value(state, dotted, leaf)
    if not weights_only:
        _add_groups(state, layout)
        state.left_out += first.left_out
    return state


def _check_alike(ranks: list[_Rank], where: str, models: list[dict[str, Any]]) -> None:
    """Raise UserError unless all files are from one run and step, and from the stage that its config names."""
    first = ranks[0]
    for rank in ranks[1:]:
        if (rank.stage, rank.ranks, len(rank.masters)) != (first.stage, first.ranks, len(first.masters)):
            found, other = (f"ZeRO {r.stage} on {r.ranks} ranks" for r in (rank, first))
            raise UserError(f"{rank.where}: of {found}, rank 0's of {other}: of different runs")
    for number, model in enumerate(models):
        for key in ("param_shapes", "frozen_param_shapes", "global_steps"):
            if model.get(key) != models[0].get(key):
                raise UserError(f"{where}: rank {number} has another {key}: of different runs or steps")
    config = models[0].get("ds_config")
    said = config.get("zero_optimization", {}).get("stage") if isinstance(config, dict) else None
    if said is not None and said != first.stage:
        raise UserError(f"{where}: it says ZeRO {said}, but the optimizer's files are of ZeRO {first.stage}")


class _Layout:
    """Which range of which flat tensor holds each trained parameter."""

    def __init__(self, ranks: list[_Rank], groups: list[dict[str, Any]]) -> None:
        self.ranks, self.first = ranks, ranks[0]
        self.groups = [{str(name): tuple(shape) for name, shape in group.items()} for group in groups]
        self.shapes: dict[str, Ints] = {name: shape for group in self.groups for name, shape in group.items()}
        if len(groups) != len(self.first.masters):
            raise UserError(f"{self.first.where}: {len(self.first.masters)} groups, its model has {len(groups)}")

    def places(self, group: int) -> Iterator[tuple[str, list[_Place]]]:
        """Each parameter of a group with the ranges that hold it."""
        offset, shapes = 0, self.groups[group]
        # DeepSpeed saves flat tensors without the padding at their end. The size of a part includes the padding.
        part = self.first.masters[group].numel + self.first.paddings[group]
        for index, (name, shape) in enumerate(shapes.items()):
            numel, count = prod(shape), len(self.ranks)
            if self.first.stage == 3:
                size = -(-numel // count)
                cuts = [(size * rank, min(size, numel - size * rank)) for rank in range(count)]
                yield name, [_Place(s, n, rank, offset) for rank, (s, n) in enumerate(cuts) if n > 0]
                offset += size
                continue
            edges = [(rank, max(offset, part * rank), min(offset + numel, part * (rank + 1))) for rank in range(count)]
            yield name, [_Place(a - offset, b - a, rank, a - part * rank) for rank, a, b in edges if a < b]
            offset += numel + (self.first.alignments[group][index] if self.first.alignments else 0)

    def content(self, group: int, key: str | None, shape: Ints, places: list[_Place]) -> Content:
        """A parameter's masters, or one of its states. Raises UserError when ranks hold less than `shape` needs."""
        parts = []
        for place in places:
            rank = self.ranks[place.rank]
            flat = rank.masters[group] if key is None else rank.states[group][key]
            flat.end = max(flat.end, place.offset + place.length)
            parts.append((place, flat))
        held = sum(min(p.length, max(0, flat.numel - p.offset)) for p, flat in parts)
        if held != prod(shape):
            raise UserError(f"{self.first.where}: ranks hold {held} of {prod(shape)} elements: of another model")
        return _Scattered(shape, parts[0][1].dtype, parts)

    def check_all_used(self, group: int) -> None:
        """Raise UserError when a rank holds more unused elements than padding explains."""
        slack = 2 * len(self.ranks) + _ALIGNED_ELEMENTS * len(self.groups[group])
        unused = sum(rank.masters[group].numel - rank.masters[group].end for rank in self.ranks)
        if unused > slack:
            raise UserError(f"{self.first.where}: {unused} elements are of no parameter: of another model")


def _add_trained(state: State, layout: _Layout, weights_only: bool) -> None:
    first = layout.first
    for group, shapes in enumerate(layout.groups):
        for name, places in layout.places(group):
            shape = shapes[name]
            state.tensors[name] = StateTensor("model", layout.content(group, None, shape, places))
            if weights_only:
                continue
            for key in first.states[group]:
                state.tensors[f"{name}.{key}"] = StateTensor("optim", layout.content(group, key, shape, places))
            count = first.counts[group]
            if first.states[group] and count is not None:
                state.step_counts[name] = count
        layout.check_all_used(group)


def _add_untrained(state: State, where: str, models: list[dict[str, Any]], layout: _Layout) -> None:
    """Add frozen parameters and buffers."""
    model, stage = models[0], layout.first.stage
    buffers, cut = set(model["buffer_names"]), model.get("frozen_param_shapes") or {}
    state.aliases = {str(name): str(first) for name, first in (model.get("shared_params") or {}).items()}
    if stage < 3:  # stage 3 has no weights here; before 0.11 stages 1 and 2 did not record ties
        first_at = {c.place: name for name, c in reversed(model["module"].items()) if name not in buffers}
        pairs = ((name, first_at.get(c.place, name)) for name, c in model["module"].items())
        state.aliases |= {name: first for name, first in pairs if first != name}
    for name, content in model["module"].items():
        if name in buffers:
            state.tensors[name] = StateTensor("model", content)
        elif name in layout.shapes or name in state.aliases:
            continue
        elif stage < 3:
            state.tensors[name] = StateTensor("frozen", content)
        elif name not in cut:
            raise UserError(f"{where}: {name} neither trains nor is it among what is frozen: it was not saved")
    for name, shape in cut.items() if stage == 3 else ():
        numel, parts = prod(shape), []
        for rank, told in enumerate(models):
            flat = _Flat(told["frozen_param_fragments"][name])
            size = -(-numel // len(models))
            length = min(size, numel - size * rank)
            if length > 0:
                flat.end = length
                parts.append((_Place(size * rank, length, rank, 0), flat))
            if flat.numel < length:
                raise UserError(f"{where}: ranks hold less of {name} than its shape {list(shape)}")
        state.tensors[name] = StateTensor("frozen", _Scattered(tuple(shape), parts[0][1].dtype, parts))


def _add_groups(state: State, layout: _Layout) -> None:
    """Add the optimizer's own settings, with parameter names in place of numbers."""
    names = [list(group) for group in layout.groups]
    for index, group in enumerate(layout.first.groups):
        for key, value in group.items():
            members = [name for number in value for name in names[number]] if key == "params" else value
            add_value(state, f"optimizer.param_groups.{index}.{key}", members)
