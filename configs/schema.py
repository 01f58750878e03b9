"""The typed config of a run.

Every field says what it does, its unit stands in its name, and `result` or `speed` says whether it changes what is
learned or only how fast. The `result` fields make the fingerprint: a run folder continues only under the same one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from configs.deepspeed import contradictions, usable
from configs.model_section import ModelSection
from configs.monitor_section import MonitorSection
from configs.paths import PathText, fitting
from configs.section import MILLION, MOST_S, MOST_STEPS, MOST_TIMES, MOST_TOKENS, Section, result, speed
from configs.slurm_section import SlurmSection


class RunSection(Section):
    """The run itself: where it lives, what is written down."""

    name: Annotated[str, AfterValidator(fitting)] = speed(
        "run", "name of the run; the folder is `runs/<name>` unless `run.dir` is given", min_length=1
    )
    dir: PathText | None = speed(None, "the run folder, on a filesystem that every node sees")
    seed: int = result(0, "seed of initialisation, data order and dropout", ge=0, le=2**63 - 1)
    accept_changes: list[str] = speed(
        [], "keys that may differ from what this folder was begun with; `data.content`: what the sources hold"
    )
    log_every_steps: int = speed(10, "steps between two rows of metrics.jsonl", ge=1, le=MOST_STEPS)
    tensorboard: bool = speed(True, "also write the metrics for TensorBoard")
    wandb: str | None = speed(
        None, "project of Weights & Biases that gets the metrics, too; needs muster[wandb]", min_length=1
    )
    stop_grace_s: float = speed(
        120.0, "how long a stopping run may take to save before it is ended by force", gt=0, le=MOST_S
    )
    max_restarts: int = speed(3, "restarts in place after a failure, by `launch run`", ge=0, le=MOST_TIMES)
    give_up_after: int = speed(3, "attempts without a new checkpoint before the run is given up", ge=1, le=MOST_TIMES)


class AllowSection(Section):
    """What `start.from` may differ in: globs over parameter names, which stand for their optimizer state too."""

    missing: list[str] = result([], "not in the checkpoint: these begin with initial values")
    unexpected: list[str] = result([], "only in the checkpoint: these are left out")
    reshaped: list[str] = result([], "of another shape: what both have is kept, the rest begins with initial values")
    dtype: list[str] = result([], "stored in a wider number format: these are rounded")
    replaced: list[str] = result([], "these begin with initial values although the checkpoint has them")


class StartSection(Section):
    """Where a new run begins; read only while the run folder holds no committed checkpoint."""

    from_: PathText | None = result(None, "a run folder or a checkpoint to begin from", alias="from")
    take: Literal["weights", "everything"] = result(
        "weights", "`weights` starts at step 0; `everything` carries optimizer, step and data position on"
    )
    rename: dict[str, str] = result(
        {}, "names in the checkpoint -> names here; each `*` of one stands for that of the other"
    )
    allow: AllowSection = result(AllowSection(), "which differences are wanted; any other is refused")


class Source(Section):
    """One source of documents."""

    name: str = result(..., "name in logs, metrics and errors", pattern=r"^[A-Za-z0-9_.-]+$")
    kind: Literal["text", "jsonl", "tokens"] = result(
        "text", "a folder (or file) of text; JSONL with one document a line; .npy files of token ids"
    )
    path: PathText = result(..., "file or folder; `python:stdlib` is the source of Python's own standard library")
    pattern: str = result("**/*", "which files of a folder, as a glob")
    field: str = result("text", "the key of a JSONL line that holds the document")
    weight: float = result(1.0, "share of the samples, relative to the other sources", gt=0, le=1e12)


class DataSection(Section):
    """What is read, and how it is cut into samples."""

    seq_len: int = result(..., "tokens per sample", ge=2, le=MOST_TOKENS)
    tokenizer: PathText = result(
        "bytes", "`bytes`, the path of a tokenizer.json, or `none` where all sources are token ids"
    )
    end_token: str | None = result(None, "token that ends a document, if it has no usual one; its number under `none`")
    sources: list[Source] = result(..., "where documents come from", min_length=1)
    validation_fraction: float = result(0.01, "share of documents held out, chosen by hash", ge=0, lt=1)
    document_mask: bool = result(True, "tokens see only their own document")
    cache: PathText | None = speed(None, "folder of prepared samples; default: `.cache` beside the run folder")
    prefetch_steps: int = speed(2, "batches made ahead by the background worker", ge=1, le=MILLION)
    record_samples: bool = speed(False, "write the sample numbers of every step to the attempt's folder")

    @model_validator(mode="after")
    def _without_tokenizer(self) -> DataSection:
        text = next((source.name for source in self.sources if source.kind != "tokens"), None)
        if self.tokenizer == "none" and text is not None:
            raise ValueError(f"tokenizer none: source {text!r} holds text, which needs a tokenizer")
        if self.tokenizer == "none" and not re.fullmatch("[0-9]{1,18}", self.end_token or ""):
            raise ValueError("tokenizer none: end_token must give the number of the token that ends a document")
        return self


class TaskSection(Section):
    """What is learned."""

    name: Literal["lm"] = result("lm", "language modelling: predict the next token")
    z_loss: float = result(0.0, "weight of the squared log-partition penalty", ge=0, le=1000)
    loss_chunk_tokens: int = speed(1024, "tokens whose logits are held at once", ge=1, le=MOST_TOKENS)
    sample_prompt: str = speed("def ", "begins the text that a finished run writes")
    sample_tokens: int = speed(0, "length of that text; 0: none", ge=0, le=MILLION)


class TrainSection(Section):
    """How long and in what batches."""

    steps: int = result(
        ...,
        "the absolute last step; may change later: the schedule then ends at the new one, and a line says the new rate",
        ge=0,
        le=MOST_STEPS,
    )
    global_batch: int = result(..., "samples per update over all ranks", ge=1, le=10**8)
    micro_batch: int = speed(1, "samples per rank and forward, at most", ge=1, le=MOST_TIMES)
    clip_norm: float | None = result(1.0, "largest global gradient norm", gt=0, le=1e30)
    nonfinite_limit: int = result(5, "updates skipped in a row before the run fails", ge=1, le=MOST_STEPS)
    validate_every_steps: int = speed(0, "steps between validations; 0: never", ge=0, le=MOST_STEPS)
    validate_samples: int = result(256, "validation samples, at most", ge=1, le=10**12)
    early_stop_patience: int = result(
        0, "validations without a better loss before the run ends; 0: never", ge=0, le=MOST_STEPS
    )
    time_limit_s: float | None = speed(None, "an attempt stops with a save after this long", gt=0, le=MOST_S)

    @model_validator(mode="after")
    def _early_stop(self) -> TrainSection:
        if self.early_stop_patience and not self.validate_every_steps:
            raise ValueError("early_stop_patience needs validate_every_steps")
        return self


class OptimSection(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "adam", "sgd", "muon"] = result(
        "adamw", "muon: Muon on the blocks' matrices, AdamW elsewhere"
    )
    lr: float = result(3e-4, "peak learning rate (of AdamW's part, under muon)", gt=0, le=1000)
    muon_lr: float = result(0.02, "peak learning rate of Muon's part", gt=0, le=1000)
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = result([0.9, 0.95], "Adam's decay rates")
    eps: float = result(1e-8, "Adam's epsilon", gt=0, le=1)
    momentum: float = result(0.9, "of SGD and Muon", ge=0, lt=1)
    weight_decay: float = result(
        0.1,
        "on matrices, never on norms and biases; under adam and sgd, where it is part of the gradient, 0 unless given",
        ge=0,
        le=1000,
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = result(
        "cosine", "after warm-up; wsd: stable, then decay"
    )
    warmup_steps: int = result(0, "linear warm-up from 0", ge=0, le=MOST_STEPS)
    decay_steps: int = result(0, "wsd: length of the final decay", ge=0, le=MOST_STEPS)
    final_lr_ratio: float = result(0.1, "learning rate at the last step, relative to the peak", ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _decay_is_meant(cls, given: Any) -> Any:
        """AdamW's and Muon's decay does not pass through the gradient. That of adam and sgd does: it is L2, and asked
        for by whoever wants it."""
        if isinstance(given, dict) and given.get("name") in ("adam", "sgd"):
            return {"weight_decay": 0.0, **given}
        return given

    @model_validator(mode="after")
    def _rates(self) -> OptimSection:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if self.schedule == "wsd" and not self.decay_steps:
            raise ValueError("schedule wsd needs decay_steps")
        return self


class PrecisionSection(Section):
    """Number formats; gradients are always reduced in fp32."""

    compute: Literal["bf16", "fp32"] = result("bf16", "of forward and backward")
    params: Literal["fp32", "bf16"] = result("fp32", "of the parameters that the optimizer updates, and of its state")
    deterministic: bool = result(False, "only algorithms that give the same bits each time")


class ParallelSection(Section):
    """Layout. Changes speed and memory, and the order of summation, nothing else."""

    engine: Literal["fsdp", "zero"] = speed("fsdp", "what shards the model: FSDP2, or DeepSpeed ZeRO")
    zero_stage: int = speed(  # no Literal: to Python, and so to pydantic, `true` is 1 and `2.0` is 2
        3, "zero shards the optimizer's state (1), gradients as well (2), parameters as well (3)", ge=1, le=3
    )
    deepspeed: Annotated[dict[str, Any], AfterValidator(usable)] = speed(
        {}, "zero: DeepSpeed's own settings; what contradicts this config is refused"
    )
    replicate: int = speed(
        1, "fsdp: groups that each hold the whole model; -1, with shard=1: every rank (DDP)", ge=-1, le=MILLION
    )
    shard: int = speed(-1, "ranks that share one copy of the model; -1: what is left", ge=-1, le=MILLION)
    tensor: int = speed(
        1, "fsdp: ranks that compute each sample together, every matrix split among them", ge=1, le=MILLION
    )
    reshard: bool = speed(True, "fsdp: free a block's parameters again after its forward (less memory, more traffic)")
    prefetch_blocks: int = speed(1, "fsdp: blocks gathered ahead of the one that computes", ge=1, le=MILLION)
    accumulate: Literal["sharded", "unsharded"] = speed(
        "sharded",
        "fsdp: gradients between micro batches: reduced each time, or kept whole until the last (faster, more memory)",
    )
    cpu_offload: bool = speed(False, "keep parameters, gradients and optimizer state in host memory")
    activation_checkpoint: Literal["none", "selective", "full"] = speed(
        "none", "recompute in backward: nothing, all but matrix products, or whole blocks"
    )
    compile: bool = speed(False, "torch.compile each block")
    load_timeout_s: float = speed(1800.0, "longest wait for another rank until the first step is done", gt=0, le=MOST_S)
    step_timeout_s: float = speed(300.0, "longest wait for another rank after that", gt=0, le=MOST_S)

    @model_validator(mode="after")
    def _shard(self) -> ParallelSection:
        if self.shard == 0 or self.replicate == 0:
            raise ValueError("replicate and shard must be -1 (what is left) or at least 1")
        if self.shard == self.replicate == -1:
            raise ValueError("only one of replicate and shard can be -1 (what is left)")
        return self


class FreezeChange(Section):
    """Which parameters train after a step: takes the place of all patterns before it."""

    step: int = result(..., "the step after which this holds", ge=1, le=MOST_STEPS)
    frozen: list[str] = result([], "parameters that stay as they are from then on")
    trainable: list[str] = result([], "exceptions from `frozen`")


class FreezeSection(Section):
    """Which parameters train. Patterns are globs over parameter names, e.g. `blocks.0.*`; trainable wins."""

    frozen: list[str] = result([], "parameters that stay as they are")
    trainable: list[str] = result([], "exceptions from `frozen`")
    schedule: list[FreezeChange] = result([], "changes at later steps, in order")

    @model_validator(mode="after")
    def _ascending(self) -> FreezeSection:
        steps = [change.step for change in self.schedule]
        if steps != sorted(set(steps)):
            raise ValueError(f"freeze.schedule: steps must ascend, got {steps}")
        return self


class KeepSection(Section):
    """Which checkpoints stay when newer ones are committed."""

    last: int = speed(2, "the newest ones", ge=1, le=MOST_TIMES)
    every_steps: int = speed(0, "also every step that this divides; 0: none", ge=0, le=MOST_STEPS)
    best: bool = speed(True, "also the one with the lowest validation loss")


class CheckpointSection(Section):
    """When and how state is saved."""

    every_steps: int = speed(500, "steps between saves; 0: only at the end", ge=0, le=MOST_STEPS)
    asynchronous: bool = speed(True, "write while training goes on, from one copy in host memory")
    failures_limit: int = speed(3, "failed saves in a row before the run fails", ge=1, le=MOST_TIMES)
    frozen: Literal["stored", "reference"] = speed(
        "stored", "frozen parameters: in each checkpoint (by hard links), or left in that of `start.from` and named"
    )
    keep: KeepSection = speed(KeepSection(), "which checkpoints stay")


class Config(Section):
    """Everything a run is."""

    run: RunSection = speed(RunSection(), "the run itself")
    model: ModelSection = result(..., "the model")
    start: StartSection = result(StartSection(), "where a new run begins")
    data: DataSection = result(..., "what is read")
    task: TaskSection = result(TaskSection(), "what is learned")
    train: TrainSection = result(..., "how long and in what batches")
    optim: OptimSection = result(OptimSection(), "optimizer and schedule")
    precision: PrecisionSection = result(PrecisionSection(), "number formats")
    parallel: ParallelSection = speed(ParallelSection(), "layout")
    freeze: FreezeSection = result(FreezeSection(), "which parameters train")
    checkpoint: CheckpointSection = speed(CheckpointSection(), "saving")
    monitor: MonitorSection = speed(MonitorSection(), "watching each node")
    slurm: SlurmSection = speed(SlurmSection(), "what to ask a Slurm cluster for")

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} is longer than model.max_seq_len {self.model.max_seq_len}"
            )
        names = Counter(source.name for source in self.data.sources)
        twice = next((name for name, count in names.items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"data.sources: the name {twice!r} stands twice")
        if self.task.sample_tokens and self.data.tokenizer == "none":
            raise ValueError("task.sample_tokens needs a data.tokenizer, which is none")
        return self

    @model_validator(mode="after")
    def _tensor_fits(self) -> Config:
        """What cannot be split among the ranks of a tensor group is refused here, before any rank is started."""
        model, tensor = self.model, self.parallel.tensor
        kv_heads = model.kv_heads or model.heads
        for key, count in (("heads", model.heads), ("kv_heads", kv_heads)):
            if count % tensor:
                fitting = [n for n in range(1, min(kv_heads, 64) + 1) if model.heads % n == kv_heads % n == 0]
                raise ValueError(
                    f"model.{key} {count} is not a multiple of parallel.tensor {tensor}: whole heads go to each rank; "
                    f"use a parallel.tensor of {' or '.join(map(str, fitting))}"
                )
        for key, size in (("vocab_size", model.vocab_size), ("mlp_dim", model.mlp_dim)):
            if -(-size // tensor) * (tensor - 1) >= size:  # parts of equal size, the last one smaller
                raise ValueError(
                    f"model.{key} {size} leaves no part for the last of parallel.tensor {tensor} ranks; "
                    f"use a smaller parallel.tensor"
                )
        padded = -(-self.data.seq_len // tensor) * tensor
        if model.position == "learned" and padded > model.max_seq_len:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} is filled up to {padded}, a multiple of parallel.tensor {tensor}, "
                f"but model.max_seq_len gives learned positions for {model.max_seq_len}; "
                f"use data.seq_len={padded - tensor} or a parallel.tensor that divides it"
            )
        return self

    @model_validator(mode="after")
    def _zero_fits(self) -> Config:
        if self.parallel.engine == "zero":
            wrong = contradictions(self)
            if wrong:
                raise ValueError("; ".join(wrong))
        return self

    @property
    def run_dir(self) -> str:
        return self.run.dir or f"runs/{self.run.name}"


def fields(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every leaf of a config as (dotted key, JSON value, "result" or "speed")."""
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        key = f"{prefix}{info.alias or name}"
        if isinstance(value, Section):
            yield from fields(value, key + ".")
            continue
        extra = info.json_schema_extra
        assert isinstance(extra, dict)
        if isinstance(value, list):
            value = [v.model_dump(by_alias=True) if isinstance(v, Section) else v for v in value]
        yield key, value, str(extra["changes"])


def result_fields(config: Config) -> dict[str, Any]:
    """The fields that change what is learned, by dotted key. `train.steps` is left to an event of its own."""
    return {k: v for k, v, changes in fields(config) if changes == "result" and k != "train.steps"}


def fingerprint(config: Config) -> str:
    """16 hex digits over `result_fields`: equal exactly when two configs learn the same thing."""
    text = json.dumps(result_fields(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_dict(config: Config) -> dict[str, Any]:
    """Plain data, as it is written to config.yaml and into checkpoints."""
    return config.model_dump(by_alias=True, mode="json")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys of two `result_fields` that differ, as (key, old value, new value)."""
    keys = sorted(old.keys() | new.keys())
    return [(k, old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)]
