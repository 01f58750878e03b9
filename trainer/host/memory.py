"""The least memory that a run needs on this machine, and the memory that this machine has. No torch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import psutil

from configs.config import Config
from configs.errors import UserError
from configs.schema.model import DecoderSection, ModelSection
from configs.schema.own import OwnModel
from trainer.host.cgroups import groups_above

_SAMPLE_BYTES = 20  # per token of a batch: the token, its target, its document
_DRIVER = Path("/dev/nvidiactl")  # exists where the model is in GPUs


def check_memory(config: Config, here: int, processes: int) -> None:
    """Raise UserError for what cannot fit into this machine, on which `here` of all `processes` run.

    Only memory that every layout needs is counted, so no run is refused that would fit.
    """
    total = _machine_bytes()
    share = -(-config.train.global_batch // processes)
    length = config.data.seq_len or 1  # a row of a table has no known length
    batches = here * share * length * _SAMPLE_BYTES * (config.data.prefetch_steps + 1)
    if batches > total:
        raise UserError(
            f"train.global_batch {config.train.global_batch} of data.seq_len {length} needs "
            f"{batches / 1e9:.0f} GB of memory for the batches of {here} processes ({config.data.prefetch_steps} made "
            f"ahead), this machine has {total / 1e9:.0f} GB: lower train.global_batch or data.prefetch_steps"
        )
    numbers = parameters(config.model)
    held = numbers * _least_bytes(config) * here // processes
    if held > total and not _DRIVER.exists():
        raise UserError(
            f"model: {numbers:.3g} parameters and what the optimizer keeps need {held / 1e9:.0f} GB in {here} of "
            f"{processes} processes, this machine has {total / 1e9:.0f} GB and no GPU: take a smaller model "
            f"({_sizes(config.model)}) or more machines"
        )


def _least_bytes(config: Config) -> int:
    """Bytes that each parameter needs with its optimizer state, where all parameters train in memory."""
    if config.parallel.engine == "zero" and "nvme" in str(config.parallel.deepspeed):
        return 0
    width = 4 if config.precision.params == "fp32" else 2
    if config.freeze.frozen or config.freeze.schedule or config.optim.name == "sgd":
        return 2
    return width * (2 if config.optim.name == "muon" else 3)


def parameters(model: ModelSection) -> int:
    """How many numbers the model's matrices hold, without norms, biases, and sizes that only the data give."""
    if isinstance(model, OwnModel):
        return 0  # only the model's own code knows
    if not isinstance(model, DecoderSection):
        return sum(a * b for a, b in pairwise((model.features or 1, *model.hidden, model.outputs or 1)))
    width = (model.head_dim or model.dim // model.heads) * (2 * model.heads + 2 * (model.kv_heads or model.heads))
    block = model.dim * (width + model.mlp_dim * (3 if model.mlp == "swiglu" else 2))
    rows = (model.vocab_size or 1) * (1 if model.tie_embeddings else 2)
    rows += model.max_seq_len if model.position == "learned" else 0
    return model.layers * block + rows * model.dim


def _sizes(model: ModelSection) -> str:
    """The keys that make the model large, with their values."""
    if isinstance(model, DecoderSection):
        return f"model.layers {model.layers}, model.dim {model.dim}, model.vocab_size {model.vocab_size}"
    assert not isinstance(model, OwnModel)  # it counts 0 parameters, so it is never too large
    return f"model.features {model.features}, model.hidden {model.hidden}, model.outputs {model.outputs}"


def _machine_bytes() -> int:
    """Memory and swap of this machine, or the part that the control groups of this process allow."""
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    return min([total, *(limit for group in groups_above("memory") if (limit := _limit(group)) is not None)])


def _limit(group: Path) -> int | None:
    """Bytes that a group allows. None without a limit, which version 1 writes as a number beyond any machine."""
    for name in ("memory.max", "memory.limit_in_bytes"):  # version 2, and 1
        try:
            text = (group / name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isascii() and text.isdigit() else None
    return None
