"""`--debug`: one process, deterministic, a few steps of the same config cut to size, every check on."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs.config import Config
from configs.errors import UserError
from configs.fingerprint import to_dict
from configs.schema.model import DecoderSection
from trainer.data.batch import Batch
from trainer.engines.base import Engine
from trainer.host.arguments import typed
from trainer.host.environment import Ranks
from trainer.host.held import HeldFolder
from trainer.host.terminal import say
from trainer.life.attempts import FINISHED
from trainer.life.folder import RunFolder
from trainer.life.stop import StopWish
from trainer.run import Run
from trainer.start import start
from trainer.step import RunFailed
from trainer.tasks.base import Task

STEPS = 5
LOSS_TOLERANCE = 0.5  # nats around the loss of guessing; a cut model's first logits spread by about 0.2


def debug(config: Config, wish: StopWish) -> int:
    """Run `config` cut to size under all checks, in a folder of its own; returns the exit code."""
    if Ranks.read(os.environ).size > 1:
        raise UserError(f"--debug runs in one process: start it with {typed('trainer', 'CONFIG')}, not with torchrun")
    folder = HeldFolder.temporary("muster-debug-")
    torch.autograd.set_detect_anomaly(True)
    try:
        code = start(cut_to_size(config, str(folder.path / "run")), wish, CheckedRun)
    except UserError as error:
        folder.remove()
        if str(folder.path) in str(error):
            raise UserError(f"{error}\n({folder.path} was a folder of this trial, and is removed)") from error
        raise
    if code == FINISHED:
        folder.remove()  # else it is left to be looked at, until the next `--debug`
        say(f"debug: every check held; {folder.path}, named above, is removed again: nothing of it is left to look at")
    return code


def cut_to_size(config: Config, run_dir: str) -> Config:
    """The same config with a narrower model, shorter samples and smaller batches. What is small already stays, and so
    does every layer: patterns name them."""
    data = to_dict(config)
    if config.start.from_ is None and isinstance(config.model, DecoderSection):
        data["model"] |= _cut_model(data["model"])
    if config.data.seq_len is not None:
        data["data"]["seq_len"] = min(config.data.seq_len, 128)
    data["data"]["cache"] = str(RunFolder(Path(config.run_dir)).cache(config.data.cache))
    batch = min(config.train.global_batch, 8)
    data["train"] |= {
        "steps": STEPS if config.train.epochs is not None else min(config.train.steps, STEPS),
        "epochs": None,
        "global_batch": batch,
        "micro_batch": min(config.train.micro_batch, max(batch // 2, 1)),  # so that gradients are accumulated
        "validate_every_steps": min(config.train.validate_every_steps, STEPS),
        "validate_samples": min(config.train.validate_samples, 8),
    }
    steps = data["train"]["steps"]
    warmup = min(config.optim.warmup_steps, steps // 2)
    data["optim"] |= {"warmup_steps": warmup, "decay_steps": min(config.optim.decay_steps, max(steps - warmup, 1))}
    data["run"] |= {"dir": run_dir, "log_every_steps": 1, "tensorboard": False}
    data["parallel"] |= {"replicate": 1, "shard": -1, "tensor": 1, "compile": False}
    data["precision"] |= {"deterministic": True}
    return Config.model_validate(data)


def _cut_model(model: dict[str, Any]) -> dict[str, Any]:
    heads, width = model["heads"], model["head_dim"] or model["dim"] // model["heads"]
    group = heads // (model["kv_heads"] or heads)
    small_heads = min(heads, 4)
    small_group = math.gcd(group, small_heads)
    small_width = min(width, 32)
    return {
        "heads": small_heads,
        "kv_heads": small_heads // small_group,
        "head_dim": small_width,
        "dim": min(model["dim"], 128),
        "mlp_dim": min(model["mlp_dim"], 384),
    }


class CheckedRun(Run):
    """A run whose engine looks at every batch and gradient."""

    def build(self) -> None:
        super().build()
        fresh = self.origin.path is None
        expected = self.task.first_loss(self.config) if fresh else None
        self.engine = CheckedEngine(self.engine, self.task, expected)


class CheckedEngine:
    """Passes everything on to an engine, and checks what goes in and what comes out. Raises RunFailed."""

    def __init__(self, engine: Engine, task: Task, expected_loss: float | None) -> None:
        self._engine, self._task, self._expected_loss = engine, task, expected_loss
        self._loss = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward_backward(self, batch: Batch, scale: Callable[[], torch.Tensor], last: bool) -> torch.Tensor:
        fault = self._task.fault(batch)
        if fault is not None:
            raise RunFailed("check", f"check failed: {fault}")
        sums = self._engine.forward_backward(batch, scale, last)
        self._loss += float(sums[0] * scale())
        return sums

    def update(self, lr_factor: float, clip: float | None) -> torch.Tensor:
        check_gradients(self._engine.gradients(), self._engine.trainable())
        if self._expected_loss is not None:
            check_first_loss(self._loss, self._expected_loss)
        self._expected_loss, self._loss = None, 0.0
        return self._engine.update(lr_factor, clip)


def check_gradients(gradients: dict[str, torch.Tensor], trainable: set[str]) -> None:
    """Every trainable parameter has a finite gradient that is not all zero; nothing else has one."""
    frozen = sorted(gradients.keys() - trainable)
    missing = sorted(trainable - gradients.keys())
    nonfinite = sorted(n for n, g in gradients.items() if not torch.isfinite(g).all())
    zero = sorted(n for n, g in gradients.items() if not g.any())
    for names, what in (
        (frozen, "is frozen but has a gradient"),
        (missing, "is trainable but has no gradient"),
        (nonfinite, "has a gradient that is not finite"),
        (zero, "has a gradient of zeros: nothing of it would be learned"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise RunFailed("check", f"check failed: {names[0]}{more} {what}")


def check_first_loss(loss: float, expected: float) -> None:
    """A fresh model knows nothing: its loss is that of guessing."""
    if not abs(loss - expected) < LOSS_TOLERANCE:
        raise RunFailed("check", f"check failed: the first loss is {loss:.3f}, that of guessing is {expected:.3f}")
