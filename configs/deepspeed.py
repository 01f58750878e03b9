"""DeepSpeed's settings: what this project decides, what a config may add, and what would contradict. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from configs.schema import Config

AUTO = "auto"  # other tools' files leave a setting to the caller so
NEVER_PRINT = 1 << 62

# Top-level settings that DeepSpeed reads and that are a config's own business. (It ignores names it does not know.)
FREE = {
    *("zero_optimization", "aio", "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown"),
    *("dump_state", "timers", "disable_allgather", "tensorboard", "wandb", "comet", "csv_monitor"),
}

# Ours, whatever the value: the key of our config that says it, or why it cannot be otherwise.
OURS = {
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "amp": "precision.compute",
    "torch_autocast": "precision.compute",
    "data_types": "gradients are added up in fp32",
    "communication_data_type": "gradients are reduced in fp32",
    "prescale_gradients": "gradients are plain sums over ranks",
    "gradient_predivide_factor": "gradients are plain sums over ranks",
    "gradient_allreduce_op": "gradients are plain sums over ranks",
    "activation_checkpointing": "parallel.activation_checkpoint",
    "compile": "parallel.compile",
    "checkpoint": "checkpoint",
    "load_universal_checkpoint": "start.from",
    "steps_per_print": "run.log_every_steps",
    "seed": "run.seed",
    "zero_force_ds_cpu_optimizer": "optim",
    "zero_optimization.memory_efficient_linear": "it would replace a function of PyTorch in the whole process",
    "zero_optimization.zero_quantized_nontrainable_weights": "frozen parameters would be saved rounded",
    "zero_optimization.zenflow": "its optimizer state is not in the partitions that a checkpoint is written from",
    "zero_optimization.elastic_checkpoint": "checkpoint",
    "zero_optimization.cpu_offload": "parallel.cpu_offload",
    "zero_optimization.cpu_offload_param": "parallel.cpu_offload",
    "zero_optimization.compute_grad_norm": "the norm decides whether an update is applied",
    "zero_optimization.offload_optimizer.nvme_path": "what lies on NVMe cannot be saved yet; use device: cpu",
    "zero_optimization.offload_param.nvme_path": "what lies on NVMe cannot be saved yet; use device: cpu",
    "zero_optimization.offload_optimizer.super_offload": "its optimizer is DeepSpeed's own",
    "zero_optimization.offload_optimizer.ratio": "its optimizer is DeepSpeed's own",
}


def _decided(config: Config) -> dict[str, tuple[Any, str]]:
    """Settings whose value follows from the config: (value, our key). Giving the same value again does no harm."""
    train, parallel, precision = config.train, config.parallel, config.precision
    return {
        "train_batch_size": (train.global_batch, "train.global_batch"),
        "train_micro_batch_size_per_gpu": (train.micro_batch, "train.micro_batch"),
        "gradient_accumulation_steps": (None, "train.global_batch and train.micro_batch"),
        "gradient_clipping": (train.clip_norm or 0.0, "train.clip_norm"),
        "bf16.enabled": (precision.compute == "bf16", "precision.compute"),
        "fp16.enabled": (False, "precision.compute"),
        "zero_optimization.stage": (parallel.zero_stage, "parallel.zero_stage"),
        "zero_optimization.offload_optimizer.device": (None, "parallel.cpu_offload"),
        "zero_optimization.offload_param.device": (None, "parallel.cpu_offload"),
    }


def contradictions(config: Config) -> list[str]:
    """What ZeRO cannot do of this config, and what in `parallel.deepspeed` says otherwise or is no setting."""
    decided, found = _decided(config), []
    if config.optim.name == "muon":
        found.append("parallel.engine zero cuts matrices anywhere, optim.name muon needs them whole: use fsdp")
    if config.precision.params != "fp32":
        found.append("parallel.engine zero keeps masters in fp32: precision.params must be fp32")
    found += [
        f"parallel.engine zero shards over all ranks: parallel.{key} must be 1"
        for key in ("replicate", "tensor")
        if getattr(config.parallel, key) != 1
    ]
    for key, value in _leaves(config.parallel.deepspeed):
        ours = next((OURS[whole] for whole in _prefixes(key) if whole in OURS), None)
        if value == AUTO:
            continue
        if ours is not None:
            found.append(f"parallel.deepspeed: {key} is not DeepSpeed's to say: {ours}")
        elif key in decided:
            expected, by = decided[key]
            if key.endswith(".device"):
                allowed = ("cpu",) if value == "cpu" else ("none",)
                if value not in allowed or (value == "none" and config.parallel.cpu_offload):
                    found.append(f"parallel.deepspeed: {key} can be cpu or, without {by}, none; got {value!r}")
            elif value != expected:
                found.append(f"parallel.deepspeed: {key} {value!r} contradicts {by}")
        elif key.split(".")[0] in ("bf16", "fp16"):
            found.append(f"parallel.deepspeed: {key} is not DeepSpeed's to say: precision.compute")
        elif key.split(".")[0] not in FREE:
            found.append(f"parallel.deepspeed: {key} is no setting that is passed on; see docs/zero.md")
    return found


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """What DeepSpeed is started with: the config's own settings, and ours."""
    parallel, decided = config.parallel, _decided(config)
    offload = {"device": "cpu"}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # feeds its speed display only
        "gradient_accumulation_steps": 1,  # else it divides the loss, and counts micro batches itself
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": config.precision.compute == "bf16"},
        "steps_per_print": NEVER_PRINT,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": parallel.zero_stage, "memory_efficient_linear": False},
    }
    if parallel.cpu_offload:
        ours["zero_optimization"]["offload_optimizer"] = dict(offload)
        if parallel.zero_stage == 3:
            ours["zero_optimization"]["offload_param"] = dict(offload)
    theirs: dict[str, Any] = {}
    for key, value in _leaves(parallel.deepspeed):
        if value != AUTO and (key not in decided or key.endswith(".device")):
            _put(theirs, key.split("."), value)
    return _merged(theirs, ours)


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _put(settings: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        settings = settings.setdefault(part, {})
    settings[path[-1]] = value


def _merged(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(theirs[key], ours[key]) for key in theirs.keys() & ours.keys() if isinstance(ours[key], dict)}
    return {**theirs, **ours, **both}
