"""`python -m launch checkpoint diff`: what changed, tensor by tensor, a few MB at a time.

The two checkpoints may be of any kind and layout: both are read as row-major ranges.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from launch.checkpoint.convert.convert import open_state
from launch.checkpoint.convert.state import Range, State, StateTensor, stream
from launch.checkpoint.text import Progress
from launch.look.text import size_text, table
from trainer.checkpoint.format.errors import BadCheckpoint
from trainer.host.terminal import say

_SHOWN = 20
# Fields that differ between any two saves of one run, and tell nothing about what was learned.
_OF_THE_SAVE = {"saved_s", "attempt"}


def diff(first: Path, second: Path, show_all: bool, as_json: bool) -> int:
    """Returns the exit code: 0 equal, 1 different."""
    try:
        one, other = open_state(first), open_state(second)
        found = compare(one, other)
    except BadCheckpoint as error:
        raise UserError(str(error)) from None
    if as_json:
        say(json.dumps(found, indent=1))
    else:
        say("\n".join(_text(one, other, found, show_all)))
    return 0 if found["equal"] else 1


def compare(one: State, other: State) -> dict[str, Any]:
    """Everything that differs, as plain JSON. Raises BadCheckpoint or UserError when either cannot be read."""
    shared = [key for key in one.tensors if key in other.tensors]
    alike = [key for key in shared if _shape(one.tensors[key]) == _shape(other.tensors[key])]
    progress = Progress("compared", sum(one.tensors[key].nbytes + other.tensors[key].nbytes for key in alike))
    try:
        rows = [_compare(key, one.tensors[key], other.tensors[key], progress) for key in alike]
    finally:
        progress.close()
        one.close()
        other.close()
    changed = [row for row in rows if not row["bit_equal"]]
    found: dict[str, Any] = {
        "a": str(one.path),
        "b": str(other.path),
        "only_in_a": sorted(one.tensors.keys() - other.tensors.keys()),
        "only_in_b": sorted(other.tensors.keys() - one.tensors.keys()),
        "reshaped": {
            key: [list(_shape(one.tensors[key])), list(_shape(other.tensors[key]))]
            for key in shared
            if key not in set(alike)
        },
        "bit_equal": len(rows) - len(changed),
        "changed": changed,
        "regrouped": {
            key: [one.tensors[key].group, other.tensors[key].group]
            for key in shared
            if one.tensors[key].group != other.tensors[key].group
        },
        "step_counts": _pairs(one.step_counts, other.step_counts),
        "aliases": _pairs(one.aliases, other.aliases),
        "facts": dict(_facts(one, other)),
    }
    kinds = ("only_in_a", "only_in_b", "reshaped", "changed", "regrouped", "step_counts", "aliases")
    weighty = [name for name in found["facts"] if name.partition(".")[0] != "layout"]
    found["equal"] = not any(found[kind] for kind in kinds) and not weighty
    return found


def _shape(tensor: StateTensor) -> tuple[int, ...]:
    return tuple(tensor.content.shape)


def _compare(key: str, one: StateTensor, other: StateTensor, progress: Progress) -> dict[str, Any]:
    """Sums over both tensors, part by part. Parts with equal bits need no arithmetic."""
    dtypes = [str(t.content.dtype).removeprefix("torch.") for t in (one, other)]
    dtype = dtypes[0] if dtypes[0] == dtypes[1] else dtypes
    row: dict[str, Any] = {"name": key, "group": other.group, "dtype": dtype, "elements": one.numel}
    largest = squares = reference = 0.0
    differing = 0
    bit_equal = dtypes[0] == dtypes[1]
    with _parts(one, other, progress) as parts:
        for a, b in parts:
            if dtypes[0] == dtypes[1] and torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                reference += float(a.double().square_().sum())
                continue
            bit_equal = False
            wide_a, wide_b = a.double(), b.double()
            change = wide_b - wide_a
            same = (wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan())
            change.masked_fill_(same, 0)
            differing += int((~same).sum())
            largest = max(largest, float(change.abs().max()), key=lambda x: math.inf if x != x else x)
            squares += float((change * change).sum())
            reference += float((wide_a * wide_a).sum())
    relative = math.sqrt(squares / reference) if reference > 0 else (math.inf if squares else 0.0)
    row |= {"bit_equal": bit_equal, "differing": differing, "max_change": _json(largest)}
    return row | {"relative_change": _json(relative)}


def _json(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def _finite(number: float | str) -> float:
    """The number, for sorting. A value that is no finite number counts as the largest change."""
    return float(number) if isinstance(number, float) else math.inf


@contextmanager
def _parts(
    one: StateTensor, other: StateTensor, progress: Progress
) -> Iterator[Iterator[tuple[torch.Tensor, torch.Tensor]]]:
    """The same elements of both tensors, flat. One thread per side reads ahead."""
    count, at_once = one.numel, (4 << 20) // 8

    def read(tensor: StateTensor) -> AbstractContextManager[Iterator[memoryview]]:
        ranges = [Range(tensor.content, start, min(at_once, count - start)) for start in range(0, count, at_once)]
        return stream(ranges, progress)

    with read(one) as mine, read(other) as theirs:
        yield ((_tensor(a, one), _tensor(b, other)) for a, b in zip(mine, theirs, strict=True))


def _tensor(content: memoryview, like: StateTensor) -> torch.Tensor:
    return torch.frombuffer(content, dtype=torch.uint8).view(like.content.dtype)


def _pairs(one: dict[str, Any], other: dict[str, Any]) -> dict[str, list[Any]]:
    keys = [*one, *(key for key in other if key not in one)]
    return {key: [one.get(key), other.get(key)] for key in keys if one.get(key) != other.get(key)}


def _facts(one: State, other: State) -> Iterator[tuple[str, list[Any]]]:
    """(dotted name, both values) of fields and config keys that differ, among those that both checkpoints have."""
    for name in [*one.facts, *(name for name in other.facts if name not in one.facts)]:
        both_know = name in one.facts and name in other.facts
        if name in _OF_THE_SAVE or not both_know:
            continue
        yield from _leaves(name, one.facts[name], other.facts[name])


def _leaves(name: str, one: Any, other: Any) -> Iterator[tuple[str, list[Any]]]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            yield from _leaves(f"{name}.{key}", one.get(key), other.get(key))
    elif one != other:
        yield name, [one, other]


def _text(one: State, other: State, found: dict[str, Any], show_all: bool) -> list[str]:
    lines = [
        f"A  {one.path}: {one.kind}, step {one.step}, {size_text(one.nbytes)}",
        f"B  {other.path}: {other.kind}, step {other.step}, {size_text(other.nbytes)}",
    ]
    for side in ("a", "b"):
        names = found[f"only_in_{side}"]
        if names:
            lines.append(f"{len(names)} only in {side.upper()}: {_some(names, show_all)}")
    lines += [f"{key}: shape {a} in A, {b} in B" for key, (a, b) in found["reshaped"].items()]
    lines += [f"{key}: {a} in A, {b} in B" for key, (a, b) in found["regrouped"].items()]
    lines.append(f"{found['bit_equal']} tensors are equal, bit for bit; {len(found['changed'])} changed")
    changed = sorted(found["changed"], key=lambda row: (row["group"] == "optim", -_finite(row["relative_change"])))
    shown = changed if show_all else changed[:_SHOWN]
    if shown:
        lines += [
            "",
            *table(("tensor", "dtype", "differing", "max |b - a|", "relative L2"), [_cells(r) for r in shown]),
        ]
    if len(changed) > len(shown):
        lines.append(f"and {len(changed) - len(shown)} that changed less (--all)")
    counts = sorted(f"{a} -> {b}" for a, b in found["step_counts"].values())
    if counts:
        kinds = ", ".join(f"{change} ({counts.count(change)} parameters)" for change in dict.fromkeys(counts))
        lines += ["", f"step counts: {kinds}"]
    lines += [f"{name}: {a} -> {b}" for name, (a, b) in found["aliases"].items()]
    lines += [f"{name}: {_value(a)} -> {_value(b)}" for name, (a, b) in found["facts"].items()]
    return lines


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    dtype = row["dtype"] if isinstance(row["dtype"], str) else " -> ".join(row["dtype"])
    share = f"{row['differing'] / max(row['elements'], 1):.1%}"
    return row["name"], dtype, share, f"{float(row['max_change']):.3g}", f"{float(row['relative_change']):.3g}"


def _some(names: list[str], show_all: bool) -> str:
    shown = names if show_all else names[:5]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _value(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"
