"""What a cell must give, by the history of its pattern and by plain PyTorch from the stored tensors."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.func import functional_call

from configs.config import Config
from tests.matrix.cells import GLOBAL_BATCH, PATTERNS, STEPS, Frozen
from tests.matrix.model import Buffered
from tests.stored import Stored
from trainer.data.batch import StepBatch
from trainer.data.loader import Loader
from trainer.data.open_tokens import open_tokens
from trainer.data.prepare import prepare
from trainer.life.folder import RunFolder
from trainer.tasks.lm import LanguageModelling

STATE = ("exp_avg", "exp_avg_sq")
BUFFERS = ("drop.count", "drop.gain")
TIED = {"head.weight": "embed.weight"}


class History:
    """The steps in which each parameter trained, by name. A tied parameter goes by its first name."""

    def __init__(self, pattern: str, model: Buffered) -> None:
        self.names = {name for name, _ in model.named_parameters()}
        self.aliases = TIED if model.section.tie_embeddings else {}
        self.steps = [self._trains(frozen) for frozen in PATTERNS[pattern].steps]
        self.reading = self._trains(PATTERNS[pattern].reading)

    def _trains(self, frozen: Frozen) -> set[str]:
        first = {name: name for name in self.names} | self.aliases
        hit = {first[name] for name in first for glob in frozen.frozen if fnmatchcase(name, glob)}
        spared = {first[name] for name in first for glob in frozen.trainable if fnmatchcase(name, glob)}
        return self.names - (hit - spared)

    def counts(self, more: int = 0) -> dict[str, int]:
        """How many updates each parameter that ever trained has had, `more` steps after the checkpoint."""
        trained = {n: sum(n in step for step in self.steps) + more * (n in self.reading) for n in self.names}
        return {name: count for name, count in trained.items() if count}

    def last_trained(self, more: int = 0) -> dict[str, int]:
        """The step after which each parameter last changed; 0: never."""
        every = [*self.steps, *[self.reading] * more]
        return {n: max((k + 1 for k, step in enumerate(every) if n in step), default=0) for n in self.names}

    def keys(self, more: int = 0) -> set[str]:
        """Every tensor that a checkpoint must hold."""
        return self.names | {*BUFFERS} | {f"{name}.{state}" for name in self.counts(more) for state in STATE}


def model_of(config: dict[str, Any]) -> Buffered:
    return Buffered(Config.model_validate(config).model)


def plain_losses(config: dict[str, Any], history: History, checkpoint: Stored) -> list[float]:
    """Losses of the reader's steps, from a plain loop in one process."""
    built = Config.model_validate(config)
    model = Buffered(built.model)
    missing = model.load_state_dict({key: checkpoint.tensors[key] for key in checkpoint.parameters}, strict=False)
    assert set(missing.missing_keys) == set(history.aliases)
    assert not missing.unexpected_keys
    trained = {name: p for name, p in model.named_parameters() if name in history.reading}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    decayed = {True: built.optim.weight_decay, False: 0.0}
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": decayed[p.ndim >= 2]} for p in trained.values()],
        lr=built.optim.lr,
        betas=(built.optim.betas[0], built.optim.betas[1]),
        eps=built.optim.eps,
    )
    for name, parameter in trained.items():
        if name in checkpoint.manifest["step_counts"]:
            state = {key: checkpoint.tensors[f"{name}.{key}"].clone() for key in STATE}
            optimizer.state[parameter] = {"step": torch.tensor(float(history.counts()[name])), **state}
    return [_step(built, model, optimizer, batch) for batch in _batches(built)]


def _step(config: Config, model: Buffered, optimizer: torch.optim.Optimizer, batch: StepBatch) -> float:
    losses, (targets,) = [], batch.weights
    for micro in batch.batches:
        weights: dict[str, torch.Tensor] = dict(model.named_parameters())
        if config.precision.compute == "bf16":
            weights = {name: weight.bfloat16() for name, weight in weights.items()}
        sums = functional_call(model, weights, kwargs=micro.tensors)
        (sums.total / targets).backward()
        losses.append(float(sums.loss) / targets)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert config.train.clip_norm is not None
    torch.nn.utils.clip_grad_norm_(parameters, config.train.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return sum(losses)


def _batches(config: Config) -> list[StepBatch]:
    cache = RunFolder("unused").cache(config.data.cache)
    prepared = open_tokens(prepare(config, cache, lambda text: None, lambda: False), config)
    loader = Loader(
        LanguageModelling(config.task), prepared, config, start=STEPS * GLOBAL_BATCH, step=STEPS, rank=0, world_size=1
    )
    batches = list(loader)
    loader.close()
    return batches
