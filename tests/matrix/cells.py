"""The cells of the matrix as plain data: layouts, freeze patterns, and the config of each cell's runs.

A cell is a checkpoint that one layout wrote after one pattern, and that another layout reads. A pattern is a history:
what was frozen in each of the three steps before the checkpoint, and what is frozen when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed import write_corpus

STEPS = 3  # steps of the writer
MORE = 2  # steps of the reader: the loss of the first one shows the weights, that of the second one the optimizer
GLOBAL_BATCH = 7  # no layout's data ranks divide it

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> (ranks, section `parallel`)
    "one process": (1, {}),
    "FSDP 2": (2, {"shard": 2}),
    "FSDP 3": (3, {"shard": 3}),
    "FSDP 4": (4, {"shard": 4}),
    "HSDP 2x2": (4, {"replicate": 2, "shard": 2}),
    "DDP 2": (2, {"replicate": 2, "shard": 1}),
    "TP 2": (2, {"tensor": 2, "shard": 1}),
    "TP 2 x FSDP 2": (4, {"tensor": 2, "shard": 2}),
}
ZERO: dict[str, tuple[int, dict[str, Any]]] = {
    f"ZeRO-{stage} {ranks}": (ranks, {"engine": "zero", "zero_stage": stage})
    for stage in (1, 2, 3)
    for ranks in (2, 3, 4)
}
EVERY = LAYOUTS | ZERO


@dataclass(frozen=True)
class Frozen:
    """A `freeze` section: patterns and exceptions."""

    frozen: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()

    def section(self) -> dict[str, list[str]]:
        return {"frozen": list(self.frozen), "trainable": list(self.trainable)}


@dataclass(frozen=True)
class Pattern:
    """What is frozen in each of the writer's steps, and then in the reader."""

    steps: tuple[Frozen, Frozen, Frozen]
    reading: Frozen


# In each pattern some parameters begin to train later than others, so that step counts differ.
LATE = "blocks.1.mlp.*"
BOTTOM = "blocks.0.*"
NOTHING = Frozen()
# The head is tied to the embedding, which so trains with it. The last norm trains with them from the second step on.
ONLY_HEAD, HEAD_AND_NORM = Frozen(("*",), ("head.*",)), Frozen(("*",), ("head.*", "norm.*"))

PATTERNS: dict[str, Pattern] = {
    "nothing frozen": Pattern((Frozen((LATE,)), NOTHING, NOTHING), NOTHING),
    "bottom blocks": Pattern((Frozen((BOTTOM, LATE)), Frozen((BOTTOM,)), Frozen((BOTTOM,))), Frozen((BOTTOM,))),
    "all but the head": Pattern((ONLY_HEAD, HEAD_AND_NORM, HEAD_AND_NORM), HEAD_AND_NORM),
    "frozen after having trained": Pattern((Frozen((LATE,)), NOTHING, Frozen((BOTTOM,))), Frozen((BOTTOM,))),
    "unfrozen again": Pattern((Frozen((LATE,)), Frozen((BOTTOM,)), Frozen((BOTTOM,))), NOTHING),
    # The bottom's attention never trained, its other parameters once. What has trained is frozen from now on.
    "another set frozen than before": Pattern(
        (Frozen(("blocks.0.attn.*", LATE)), Frozen((BOTTOM,)), Frozen((BOTTOM,))), Frozen(("blocks.1.*", "norm.*"))
    ),
}


@dataclass(frozen=True)
class Cell:
    """`variant`: what is unusual about the cell, see VARIANTS."""

    writer: str
    reader: str
    pattern: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.writer} -> {self.reader}, {self.pattern}" + (f", {self.variant}" if self.variant else "")


VARIANTS = {
    "bf16": "forward and backward in bf16: frozen parameters stay in memory in bf16 alone",
    "head of its own": "the head is not tied to the embedding",
    "resumed": "the run itself goes on under the other layout, its schedule freezing and unfreezing",
    "reference": "frozen parameters stay in the checkpoint that was read (`checkpoint.frozen: reference`)",
}
_NAMES = list(LAYOUTS)


def _besides(variant: str, k: int) -> list[Cell]:
    """Each writer with each pattern, and each pair with another reader."""
    return [
        Cell(writer, _NAMES[(i + 1 + k + 3 * p) % len(_NAMES)], pattern, variant)
        for i, writer in enumerate(_NAMES)
        for p, pattern in enumerate(PATTERNS)
    ]


MATRIX = [Cell(writer, reader, pattern) for writer in LAYOUTS for pattern in PATTERNS for reader in LAYOUTS]
BESIDES = [cell for k, variant in enumerate(VARIANTS) for cell in _besides(variant, k)]
# In `make test`: each layout, pattern and variant. (What tensor groups wrote is read in test_tensor_checkpoints.)
_UNUSUAL = {0: "head of its own", 2: "reference", 3: "bf16", 5: "resumed"}
DIAGONAL = [Cell(_NAMES[i], _NAMES[i + 2], pattern, _UNUSUAL.get(i, "")) for i, pattern in enumerate(PATTERNS)]

ZERO_MATRIX = [
    Cell(writer, reader, pattern)
    for writer in EVERY
    for pattern in PATTERNS
    for reader in EVERY
    if writer in ZERO or reader in ZERO
]
_EVERY = list(EVERY)
ZERO_BESIDES = [  # each ZeRO layout with each pattern and variant, as writer and as reader
    cell
    for v, variant in enumerate(VARIANTS)
    for i, zero in enumerate(ZERO)
    for p, pattern in enumerate(PATTERNS)
    for other in [_EVERY[(i + 5 * v + 3 * p) % len(_EVERY)]]
    for cell in (Cell(zero, other, pattern, variant), Cell(other, zero, pattern, variant))
]
# In `make test`: each stage writes and reads, and each pattern occurs. All cells but one need only two ranks.
ZERO_DIAGONAL = [
    Cell("ZeRO-1 2", "FSDP 2", "nothing frozen"),
    Cell("FSDP 2", "ZeRO-1 2", "another set frozen than before", "bf16"),
    Cell("ZeRO-2 2", "ZeRO-3 3", "unfrozen again"),
    Cell("ZeRO-3 3", "ZeRO-2 2", "frozen after having trained"),
    Cell("ZeRO-3 2", "FSDP 2", "all but the head"),
    Cell("FSDP 2", "ZeRO-3 2", "bottom blocks"),
]

# 3 and 4 divide none of these sizes. Of 5 rows, the last of 4 ranks has none.
MODEL: dict[str, Any] = {
    "vocab_size": 263,
    "dim": 34,
    "layers": 2,
    "heads": 2,
    "head_dim": 10,
    "mlp_dim": 5,
    "max_seq_len": 64,
    "qkv_bias": True,
    "out_bias": True,
    "qk_norm": True,
}


def _config(root: Path, folder: Path, layout: str, variant: str) -> dict[str, Any]:
    corpus = root / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    return {
        "run": {"dir": str(folder), "log_every_steps": 1, "tensorboard": False},
        "model": MODEL | {"tie_embeddings": variant != "head of its own"},
        "data": {
            "seq_len": 31,
            "cache": str(root / "cache"),
            "sources": [{"name": "words", "path": str(corpus)}],
            "record_samples": True,
        },
        "train": {"steps": STEPS, "global_batch": GLOBAL_BATCH, "micro_batch": 2},
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "precision": {"compute": "bf16" if variant == "bf16" else "fp32"},
        "parallel": {**EVERY[layout][1], "load_timeout_s": 60.0, "step_timeout_s": 60.0},
        "checkpoint": {"every_steps": 1, "keep": {"last": 100}},
    }


def writing(root: Path, folder: Path, cell: Cell) -> dict[str, Any]:
    """The config of the run that writes a cell's checkpoint. Its schedule already holds what comes later."""
    pattern = PATTERNS[cell.pattern]
    first, *later = (*pattern.steps, pattern.reading)
    schedule = [{"step": k + 1, **frozen.section()} for k, frozen in enumerate(later)]
    return _config(root, folder, cell.writer, cell.variant) | {"freeze": {**first.section(), "schedule": schedule}}


def reading(root: Path, folder: Path, cell: Cell, checkpoint: Path) -> dict[str, Any]:
    """The config of the run that reads the checkpoint: a new one with everything, or the same in `folder`, resumed."""
    if cell.variant == "resumed":
        config = writing(root, folder, Cell(cell.reader, cell.reader, cell.pattern, cell.variant))
    else:
        config = _config(root, folder, cell.reader, cell.variant)
        config["freeze"] = PATTERNS[cell.pattern].reading.section()
        config["start"] = {"from": str(checkpoint), "take": "everything"}
        config["checkpoint"]["frozen"] = "reference" if cell.variant == "reference" else "stored"
    config["train"] = {**config["train"], "steps": STEPS + MORE}
    config["checkpoint"]["every_steps"] = 0  # only at the end
    return config
