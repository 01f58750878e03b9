"""`python -m launch checkpoint show`: tensors by group, with shape, dtype, optimizer state and freeze state."""

from __future__ import annotations

import json
import time
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launch.checkpoint.list import trained_share
from launch.checkpoint.text import layout_text, open_named
from launch.look.text import age_text, size_text, table
from trainer.checkpoint.format.boxes import WIDTHS
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.host.terminal import say


def show(path: Path, patterns: list[str], as_json: bool) -> int:
    """Returns the exit code."""
    checkpoint = open_named(path)
    rows = describe(checkpoint.manifest)
    for pattern in patterns:
        if not any(_matches(row, pattern) for row in rows):
            raise UserError(f"{pattern!r} matches no parameter of {checkpoint.path}; without a pattern all are shown")
    if patterns:
        rows = [row for row in rows if any(_matches(row, pattern) for pattern in patterns)]
    head = summary(checkpoint)
    if as_json:
        say(json.dumps({"summary": head, "tensors": rows}, indent=1))
    else:
        say("\n".join([*_head_text(head), *_rows_text(rows)]))
    return 0


def _matches(row: dict[str, Any], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (row["name"], *row["tied"]))


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """The lines above the tensors."""
    manifest = checkpoint.manifest
    groups = {group: {"tensors": 0, "elements": 0, "bytes": 0} for group in ("model", "frozen", "optim")}
    for key, tensor in manifest.tensors.items():
        count = prod(manifest.shape_of(key))
        groups[tensor.group]["tensors"] += 1
        groups[tensor.group]["elements"] += count
        groups[tensor.group]["bytes"] += count * WIDTHS[tensor.dtype]
    return {
        "path": str(checkpoint.path),
        "format": manifest.format,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "saved_s": manifest.saved_s,
        "metric": manifest.metric,
        "position": manifest.position,
        "layout": manifest.layout,
        "fingerprint": manifest.fingerprint,
        "files": len(manifest.files),
        "bytes": manifest.size_bytes,
        "groups": groups,
        "trained_share": trained_share(manifest),
        "sources": [source.path for source in manifest.sources],
    }


def describe(manifest: Manifest) -> list[dict[str, Any]]:
    """One row per parameter or buffer."""
    states: dict[str, list[str]] = {}
    for key, tensor in manifest.tensors.items():
        if tensor.group == "optim":
            name, _, state = key.rpartition(".")
            states.setdefault(name, []).append(state)
    tied: dict[str, list[str]] = {}
    for alias, name in manifest.aliases.items():
        tied.setdefault(name, []).append(alias)
    return [
        {
            "name": key,
            "group": "buffer" if key in manifest.buffers else tensor.group,
            "shape": list(manifest.shape_of(key)),
            "dtype": tensor.dtype,
            "state": sorted(states.get(key, [])),
            "updates": manifest.step_counts.get(key),
            "trained_step": tensor.trained_step,
            "tied": sorted(tied.get(key, [])),
        }
        for key, tensor in manifest.tensors.items()
        if tensor.group != "optim"
    ]


def _head_text(head: dict[str, Any]) -> list[str]:
    age = age_text(time.time() - head["saved_s"])
    metric = "" if head["metric"] is None else f", validation loss {head['metric']:.6g}"
    groups = ", ".join(
        f"{name} {size_text(group['bytes'])} in {group['tensors']} tensors"
        for name, group in head["groups"].items()
        if group["tensors"]
    )
    position = ", ".join(f"{name} {value}" for name, value in head["position"].items())
    lines = [
        f"{head['path']}: format {head['format']}",
        f"  step         {head['step']}, saved {age} ago by attempt {head['attempt']}{metric}",
        f"  position     {position or '-'}",
        f"  layout       {layout_text(head['layout'])}",
        f"  fingerprint  {head['fingerprint'] or '-'}",
        f"  size         {size_text(head['bytes'])} in {head['files']} files: {groups}",
        f"  trained      {head['trained_share']:.1%} of the parameters",
    ]
    return lines + [f"  source       {path}" for path in head["sources"]]


def _rows_text(rows: list[dict[str, Any]]) -> list[str]:
    titles = {"model": "trained", "frozen": "frozen", "buffer": "buffers"}
    cells = {group: [_cells(row) for row in rows if row["group"] == group] for group in titles}
    header = ("name", "shape", "dtype", "state", "updates", "last trained")
    lines = table(header, [cell for group in titles for cell in cells[group]], "updates,last trained")
    found = ["", lines.pop(0)]
    for group, title in titles.items():
        if cells[group]:
            found += [f"-- {title}", *(lines.pop(0) for _ in cells[group])]
    return found


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    name = row["name"] + "".join(f" = {alias}" for alias in row["tied"])
    shape = " x ".join(map(str, row["shape"])) or "scalar"
    trained = "-" if row["group"] == "buffer" else f"step {row['trained_step']}" if row["trained_step"] else "never"
    updates = "-" if row["updates"] is None else row["updates"]
    return name, shape, row["dtype"], " ".join(row["state"]) or "-", updates, trained
