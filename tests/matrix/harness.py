"""Runs cells: writes each checkpoint once, and reads it in other layouts, on one pool of ranks per world size."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tests.matrix import checks
from tests.matrix.cells import EVERY, MORE, STEPS, Cell, reading, writing
from tests.matrix.expected import History, model_of, plain_losses
from tests.matrix.ranks import Memory, Told, go
from tests.pool import Pool
from tests.stored import Stored, bits
from trainer.life.entries import checkpoint_name
from trainer.life.folder import RunFolder

# For losses between 3 and 6: about ten times the differences seen, 3.5e-7 (a number's last bit is 4.8e-7) and 2.3e-4.
# In bf16, a sum that is rounded in another way is another bf16 number.
TOLERANCE = {"fp32": 5e-6, "bf16": 2e-3}
WRITTEN_SO = ("bf16", "head of its own")  # the other variants concern only the reader


@dataclass
class Written:
    """A checkpoint that a layout wrote, and what must be true of it."""

    run: Path
    config: dict[str, Any]
    history: History
    stored: Stored
    losses: list[float]  # of the steps after the checkpoint, from a plain loop


@dataclass
class Outcome:
    """The result of a cell. `loss_difference`: the largest one over the steps after loading."""

    wrong: list[str] = field(default_factory=list)
    refused: str | None = None
    loss_difference: float = 0.0


class Matrix:
    """`root`: a folder for everything. Cells that share a checkpoint write it only once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._pools: dict[int, Pool] = {}
        self._written: dict[Cell, Written | str] = {}
        self._runs = 0

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def run(self, cell: Cell, damaged: Path | None = None) -> Outcome:
        """Read a cell's checkpoint, or the damaged one in its place, and compare the result with what was written."""
        written = self.written(cell)
        folder = self._folder()
        if cell.variant == "resumed":
            shutil.copytree(written.run, folder)
        checkpoint = damaged or written.stored.folder
        config = reading(self.root, folder, cell, checkpoint)
        told = self._go(cell.reader, config, True)
        if told[0].refused:
            assert len({t.refused for t in told}) == 1, told
            shutil.rmtree(folder, ignore_errors=True)
            return Outcome(refused=told[0].refused)
        outcome = self._judge(cell, written, folder, told)
        shutil.rmtree(folder)
        return outcome

    def written(self, cell: Cell) -> Written:
        """The checkpoint of a cell, shared by all its readers. Raises AssertionError, for each reader, when the
        checkpoint contradicts its history."""
        key = replace(cell, reader=cell.writer, variant=cell.variant if cell.variant in WRITTEN_SO else "")
        if key not in self._written:
            try:
                self._written[key] = self._write(key)
            except AssertionError as error:
                self._written[key] = str(error)
        found = self._written[key]
        assert isinstance(found, Written), found
        return found

    def _write(self, cell: Cell) -> Written:
        folder = self._folder()
        config = writing(self.root, folder, cell)
        told = self._go(cell.writer, config, False)
        assert not told[0].refused, told[0].refused
        saved = [Stored(folder / "checkpoints" / checkpoint_name(step + 1)) for step in range(STEPS)]
        history = History(cell.pattern, model_of(config))
        after = config | {"train": {**config["train"], "steps": STEPS + MORE}}
        written = Written(folder, config, history, saved[-1], plain_losses(after, history, saved[-1]))
        wrong = [error for t in told for error in t.errors]
        wrong += checks.check_manifest(saved[-1], history, history.steps[-1], 0)
        wrong += checks.check_samples(RunFolder(folder), 0, 0, STEPS)
        for step, trains in enumerate(history.steps[1:], start=1):
            before, now = saved[step - 1].tensors, saved[step].tensors
            for name in history.names:
                changed = bits(before[name]) != bits(now[name])
                if changed != (name in trains):
                    wrong.append(f"{name} {'changed' if changed else 'is the same'} in step {step + 1}")
        ended = [t.ended for t in told if t.ended is not None]
        at_end = _until_saved(history)
        wrong += checks.check_memory(ended, saved[-1].tensors, at_end, compute_of(config), 0, "the writer's memory")
        assert not wrong, f"written by {cell}:\n" + "\n".join(wrong)
        return written

    def _judge(self, cell: Cell, written: Written, folder: Path, told: list[Told]) -> Outcome:
        history, before = written.history, written.stored
        resumed = cell.variant == "resumed"
        attempt, compute = (1 if resumed else 0), compute_of(written.config)
        outcome = Outcome(wrong=[error for t in told for error in t.errors])
        wrong = outcome.wrong
        loaded, ended = _memories(told)
        wrong += checks.check_memory(loaded, before.tensors, history, compute, 0, "loaded")
        for number, rank in enumerate(loaded):
            wrong += checks.unequal(f"loaded, rank {number}: progress", rank.progress, before.manifest["loop"])
        if not resumed:  # else this is the writer's checkpoint
            saved = Stored(folder / "checkpoints" / checkpoint_name(STEPS))
            wrong += checks.differing(saved.tensors, before.tensors, "saved at once")
            wrong += checks.check_manifest(saved, history, history.reading, 0)
        wrong += checks.check_samples(RunFolder(folder), attempt, STEPS, MORE)
        found = checks.losses(folder, attempt)
        if len(found) != MORE:
            wrong.append(f"losses {found} of {MORE} steps")
        else:
            outcome.loss_difference = max(abs(a - b) for a, b in zip(found, written.losses, strict=True))
            if not outcome.loss_difference <= TOLERANCE[written.config["precision"]["compute"]]:
                wrong.append(f"losses {found}, not {written.losses}")
        last = Stored(folder / "checkpoints" / checkpoint_name(STEPS + MORE))
        wrong += checks.check_manifest(last, history, history.reading, MORE)
        wrong += checks.check_trained(before.tensors, last.tensors, history)
        wrong += checks.check_memory(ended, last.tensors, history, compute, MORE, "in the end")
        return outcome

    def _go(self, layout: str, config: dict[str, Any], reads: bool) -> list[Told]:
        size = EVERY[layout][0]
        pool = self._pools.setdefault(size, Pool(size))
        told: list[Told] = pool.run(go, config, reads)
        return told

    def _folder(self) -> Path:
        self._runs += 1
        return self.root / f"run-{self._runs:04d}"


def _memories(told: list[Told]) -> tuple[list[Memory], list[Memory]]:
    loaded = [t.loaded for t in told if t.loaded is not None]
    ended = [t.ended for t in told if t.ended is not None]
    assert len(loaded) == len(ended) == len(told)
    return loaded, ended


def _until_saved(history: History) -> History:
    """The history up to the checkpoint, as if a reader trained what trained last."""
    same = object.__new__(History)
    same.__dict__ |= {**history.__dict__, "reading": history.steps[-1]}
    return same


def compute_of(config: dict[str, Any]) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[config["precision"]["compute"]]
