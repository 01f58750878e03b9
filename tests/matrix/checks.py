"""The checks of a cell. Every check returns the faults in words; an empty list means that nothing is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.matrix.cells import GLOBAL_BATCH, MORE, STEPS
from tests.matrix.expected import BUFFERS, STATE, History
from tests.matrix.ranks import Memory
from tests.stored import Stored, bits
from trainer.life.folder import RunFolder
from trainer.life.rows import read_rows

Tensors = dict[str, torch.Tensor]


def put_together(ranks: Sequence[Memory]) -> tuple[Tensors, dict[str, str], list[str]]:
    """(whole tensors from the parts of all ranks, the group of each, where ranks contradict each other)."""
    whole: Tensors = {}
    filled: dict[str, torch.Tensor] = {}
    groups: dict[str, str] = {}
    wrong = []
    for number, rank in enumerate(ranks):
        for part in rank.parts:
            dtype = getattr(torch, part.dtype)
            tensor = whole.setdefault(part.key, torch.empty(part.shape, dtype=dtype))
            seen = filled.setdefault(part.key, torch.zeros(part.shape, dtype=torch.bool))
            if groups.setdefault(part.key, part.group) != part.group or tensor.dtype != dtype:
                wrong.append(f"{part.key}: rank {number} holds it as {part.group} {part.dtype}")
                continue
            if not part.content:
                continue
            content = torch.frombuffer(bytearray(part.content), dtype=dtype)
            if part.start is not None:
                here, held = tensor.view(-1), seen.view(-1)
                box: tuple[slice, ...] = (slice(part.start, part.start + len(content)),)
            else:
                here, held, content = tensor, seen, content.view(part.sizes)
                box = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.sizes, strict=True))
            if bool(held[box].any()) and bits(here[box]) != bits(content):
                wrong.append(f"{part.key}: ranks hold different copies")
            here[box] = content
            held[box] = True
    wrong += [f"{key}: no rank holds all of it" for key, seen in filled.items() if not bool(seen.all())]
    return whole, groups, wrong


def differing(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str) -> list[str]:
    """Keys, number formats, shapes and bits that differ from the expected ones."""
    wrong = [f"{where}: {key} is missing" for key in sorted(expected.keys() - found.keys())]
    wrong += [f"{where}: {key} should not be there" for key in sorted(found.keys() - expected.keys())]
    for key in sorted(found.keys() & expected.keys()):
        mine, theirs = found[key], expected[key]
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
            wrong.append(f"{where}: {key} is {mine.dtype} {list(mine.shape)}, not {theirs.dtype} {list(theirs.shape)}")
        elif bits(mine) != bits(theirs):
            other = int((mine != theirs).sum())
            wrong.append(f"{where}: {key} differs in {other} of {mine.numel()} elements")
    return wrong


def unequal(what: str, found: Any, expected: Any) -> list[str]:
    if found == expected:
        return []
    if isinstance(found, set) and isinstance(expected, set):
        return [f"{what}: without {sorted(expected - found)}, with {sorted(found - expected)} instead"]
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [k for k in sorted({*found, *expected}) if found.get(k) != expected.get(k)]
        return [f"{what}: {k} is {found.get(k)}, not {expected.get(k)}" for k in keys]
    return [f"{what}: {found}, not {expected}"]


def in_memory(expected: Tensors, trainable: set[str], history: History, compute: torch.dtype) -> Tensors:
    """The tensors of a checkpoint that the ranks hold: all weights, frozen ones perhaps in a smaller number format, and
    the state of what trains."""
    held = {}
    for key, tensor in expected.items():
        if key in history.names and key not in trainable and compute.itemsize < tensor.element_size():
            held[key] = tensor.to(compute)
        elif key in history.names or key in BUFFERS or key.rpartition(".")[0] in trainable:
            held[key] = tensor
    return held


def check_memory(
    ranks: Sequence[Memory], expected: Tensors, history: History, compute: torch.dtype, more: int, where: str
) -> list[str]:
    """Check that the ranks together hold exactly these tensors, and that each has the right counts."""
    whole, groups, wrong = put_together(ranks)
    wrong += differing(whole, in_memory(expected, history.reading, history, compute), where)
    counts = {name: n for name, n in history.counts(more).items() if name in history.reading}
    for number, rank in enumerate(ranks):
        wrong += unequal(f"{where}, rank {number}: step count", rank.step_counts, counts)
        wrong += unequal(f"{where}, rank {number}: trains", rank.trainable, history.reading)
    frozen = {key for key, group in groups.items() if group == "frozen"}
    return wrong + unequal(f"{where}: frozen", frozen, history.names - history.reading)


def check_manifest(stored: Stored, history: History, trains: set[str], more: int) -> list[str]:
    """Check that a checkpoint says of each tensor what the history says, and has no key more or less."""
    manifest, where = stored.manifest, f"saved at {STEPS + more}"
    tensors = manifest["tensors"]
    weights = {key: entry for key, entry in tensors.items() if entry["group"] != "optim"}
    step = STEPS + more
    lineage = {n: step if n in trains else last for n, last in history.last_trained(more).items()}
    return [
        *unequal(f"{where}: keys", set(tensors), history.keys(more)),
        *unequal(f"{where}: step count", manifest["step_counts"], history.counts(more)),
        *unequal(f"{where}: buffers", sorted(manifest["buffers"]), sorted(BUFFERS)),
        *unequal(f"{where}: other names", manifest["aliases"], history.aliases),
        *unequal(f"{where}: stateless", set(manifest.get("stateless", [])), trains - history.counts(more).keys()),
        *unequal(f"{where}: frozen", {k for k, e in weights.items() if e["group"] == "frozen"}, history.names - trains),
        *unequal(
            f"{where}: last trained",
            {key: entry["trained_step"] for key, entry in weights.items() if key not in BUFFERS},
            lineage,
        ),
        *unequal(f"{where}: position", manifest["position"], {"consumed_samples": step * GLOBAL_BATCH}),
        *unequal(f"{where}: samples", manifest["loop"]["consumed_samples"], step * GLOBAL_BATCH),
        *unequal(f"{where}: step", (manifest["step"], manifest["loop"]["step"]), (step, step)),
    ]


def check_samples(folder: RunFolder, attempt: int, first: int, steps: int) -> list[str]:
    """Check that the steps after `first` got the next samples of the global order, each once."""
    given: dict[int, list[int]] = {}
    for path in sorted((folder.attempts / f"{attempt:03d}").glob("samples-*.jsonl")):
        for row in read_rows(path):
            given.setdefault(row["step"], []).extend(row["samples"])
    expected = {
        step: list(range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH))
        for step in range(first + 1, first + steps + 1)
    }
    return unequal("samples of step", {step: sorted(samples) for step, samples in given.items()}, expected)


def losses(folder: Path, attempt: int) -> list[float]:
    rows = read_rows(RunFolder(folder).metrics)
    return [row["loss"] for row in rows if "loss" in row and row["attempt"] == attempt]


def check_trained(before: Tensors, after: Tensors, history: History) -> list[str]:
    """Check that exactly the trained tensors have changed, with their state."""
    wrong = []
    for key in sorted(before.keys() & after.keys()):
        owner = key.rpartition(".")[0] if key.endswith(STATE) else key
        changed = bits(before[key]) != bits(after[key])
        if owner not in BUFFERS and changed != (owner in history.reading):
            wrong.append(f"{key}: {'changed' if changed else 'the same'} after {MORE} steps")
    return wrong
