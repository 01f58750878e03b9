"""DeepSpeed's settings: what this project decides, what a config may add, and what would contradict. No torch."""

from __future__ import annotations

from typing import Any

from configs.nested import leaves, merged, put
from configs.schema.parallel import ParallelSection
from configs.schema.sections import Sections

AUTO = "auto"  # other tools' files write this where they leave a setting to the caller
PARAMETERS = "zero_optimization.offload_param"
SECONDARY = "zero_optimization.zero_hpz_partition_size"
NEVER_PRINT = 1 << 62

# Top-level settings that DeepSpeed reads and that a config may choose. (DeepSpeed ignores names it does not know.)
FREE = {
    *("zero_optimization", "aio", "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown"),
    *("dump_state", "timers", "disable_allgather", "tensorboard", "wandb", "comet", "csv_monitor"),
}

# Settings that a config may not give, whatever the value: the key of our config that decides it, or the reason.
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
    "zero_optimization.offload_optimizer.super_offload": "its optimizer is DeepSpeed's own",
    "zero_optimization.offload_optimizer.ratio": "its optimizer is DeepSpeed's own",
}

# With parameters on NVMe, DeepSpeed 0.19.8 would read parameters ahead, before their update, and run out of buffers.
ONE_BY_ONE = ("zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_max_reuse_distance")


def _decided(config: Sections) -> dict[str, tuple[Any, str]]:
    """Setting -> (value, our key) where the config decides the value. A config may give the same value again."""
    train, parallel, precision = config.train, config.parallel, config.precision
    one_by_one = ONE_BY_ONE if _given(config.parallel).get(f"{PARAMETERS}.device") == "nvme" else ()
    return {
        **dict.fromkeys(one_by_one, (0, "offload_param.device nvme: it must be 0")),
        "train_batch_size": (train.global_batch, "train.global_batch"),
        "train_micro_batch_size_per_gpu": (train.micro_batch, "train.micro_batch"),
        "gradient_accumulation_steps": (None, "train.global_batch and train.micro_batch"),
        "gradient_clipping": (train.clip_norm or 0.0, "train.clip_norm"),
        "bf16.enabled": (precision.compute == "bf16", "precision.compute"),
        "fp16.enabled": (False, "precision.compute"),
        "zero_optimization.stage": (parallel.zero_stage, "parallel.zero_stage"),
        "zero_optimization.offload_optimizer.fast_init": (False, "how masters begin: read or drawn once all is built"),
        "zero_optimization.offload_optimizer.device": (None, "parallel.cpu_offload"),
        "zero_optimization.offload_param.device": (None, "parallel.cpu_offload"),
    }


def contradictions(config: Sections) -> list[str]:
    """What ZeRO cannot do of this config; what `parallel.deepspeed` contradicts, or sets although it is no setting."""
    decided, given, found = _decided(config), _given(config.parallel), []
    if config.optim.name == "muon":
        found.append("parallel.engine zero cuts matrices anywhere, optim.name muon needs them whole: use fsdp")
    found += [
        f"parallel.engine zero updates inside DeepSpeed, optim.{key} cannot be added there: use fsdp or weight_decay"
        for key in ("l1", "l2")
        if getattr(config.optim, key)
    ]
    if config.precision.params != "fp32":
        found.append("parallel.engine zero keeps masters in fp32: precision.params must be fp32")
    found += [
        f"parallel.engine zero shards over all ranks: parallel.{key} must be 1"
        for key in ("replicate", "tensor")
        if getattr(config.parallel, key) != 1
    ]
    if secondary_size(config.parallel) > 1:
        if config.freeze.frozen or config.freeze.schedule:
            found.append(f"parallel.deepspeed: {SECONDARY} with frozen parameters: DeepSpeed computes with wrong ones")
        if given.get(f"{PARAMETERS}.device") == "nvme":
            found.append(f"parallel.deepspeed: {SECONDARY} and {PARAMETERS}.device nvme exclude each other")
    for key, value in given.items():
        ours = next((OURS[whole] for whole in _prefixes(key) if whole in OURS), None)
        if ours is not None:
            found.append(f"parallel.deepspeed: {key} is not DeepSpeed's to say: {ours}")
        elif key in decided:
            expected, by = decided[key]
            if key.endswith(".device"):
                found += _wrong_device(config.parallel, given, key, value)
            elif value != expected:
                found.append(f"parallel.deepspeed: {key} {value!r} contradicts {by}")
        elif key.split(".")[0] in ("bf16", "fp16"):
            found.append(f"parallel.deepspeed: {key} is not DeepSpeed's to say: precision.compute")
        elif key.endswith(".nvme_path"):
            if given.get(key.replace("nvme_path", "device")) != "nvme":
                found.append(f"parallel.deepspeed: {key} needs device: nvme beside it")
        elif key.split(".")[0] not in FREE:
            found.append(f"parallel.deepspeed: {key} is no setting that is passed on; see docs/zero.md")
    return found


def _wrong_device(parallel: ParallelSection, given: dict[str, Any], key: str, value: Any) -> list[str]:
    """Why the thing that `key` offloads cannot go to the device `value`."""
    if value not in ("cpu", "nvme", "none") or (value == "none" and parallel.cpu_offload):
        allowed = "can be cpu, nvme or, without parallel.cpu_offload, none"
        return [f"parallel.deepspeed: {key} {allowed}; got {value!r}"]
    if value == "nvme" and parallel.zero_stage != 3:
        return [f"parallel.deepspeed: {key} nvme needs parallel.zero_stage 3"]
    if value == "nvme" and not isinstance(given.get(key.replace("device", "nvme_path")), str):
        return [f"parallel.deepspeed: {key} nvme needs nvme_path beside it: a folder on a disk of each node"]
    if value == "nvme" and given.get(key.replace("param", "optimizer")) != "nvme":
        return [f"parallel.deepspeed: {key} nvme needs offload_optimizer.device nvme as well"]
    return []


def deepspeed_settings(config: Sections) -> dict[str, Any]:
    """What DeepSpeed is started with: the config's own settings, and ours."""
    parallel, decided = config.parallel, _decided(config)
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's speed display uses it
        "gradient_accumulation_steps": 1,  # else DeepSpeed divides the loss, and counts micro batches itself
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": config.precision.compute == "bf16"},
        "steps_per_print": NEVER_PRINT,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": parallel.zero_stage, "memory_efficient_linear": False},
    }
    theirs: dict[str, Any] = {}
    for key, value in _given(parallel).items():
        if key not in decided or key.endswith(".device"):
            put(theirs, key.split("."), value)
    for key in decided.keys() & {*ONE_BY_ONE}:
        put(theirs, key.split("."), 0)
    if parallel.cpu_offload:  # a config may go further, to nvme
        zero = theirs.setdefault("zero_optimization", {})
        for key in ("offload_optimizer", "offload_param")[: 2 if parallel.zero_stage == 3 else 1]:
            zero.setdefault(key, {}).setdefault("device", "cpu")
    return merged(theirs, ours)


def secondary_size(parallel: ParallelSection) -> int:
    """Over how many ranks ZeRO++ cuts its second copy of the parameters; 1 without one. A value that is no number is
    left to DeepSpeed, which refuses it."""
    size = _given(parallel).get(SECONDARY)
    return size if isinstance(size, int) and size > 0 else 1


def _given(parallel: ParallelSection) -> dict[str, Any]:
    """Dotted key -> value of `parallel.deepspeed`, without the keys that are left to us or hold nothing."""
    return {key: value for key, value in leaves(parallel.deepspeed) if value not in (AUTO, None, {})}


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]
