"""The `parallel` section of the config."""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, model_validator

from configs.nested import leaves, put
from configs.paths import expanded
from configs.schema.section import MILLION, MOST_S, Section, speed

_MOST = 1e18  # the largest number in DeepSpeed's settings; its own largest is 1e14


def usable(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, their paths checked as all paths are. Raises ValueError for an unusable path or number."""
    found = copy.deepcopy(settings)
    for key, value in leaves(settings):
        try:
            if isinstance(value, str) and key.endswith("_path"):
                put(found, key.split("."), expanded(value))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if isinstance(value, int | float) and not abs(value) <= _MOST:
            raise ValueError(f"{key} must be a number of at most {_MOST:g}, not {value:g}")
    return found


class ParallelSection(Section):
    """The layout of a run over ranks. It changes speed, memory and the order of summation, nothing else."""

    engine: Literal["fsdp", "zero"] = speed("fsdp", "what shards the model: FSDP2, or DeepSpeed ZeRO")
    zero_stage: int = speed(  # no Literal: in Python, and so in pydantic, `true` equals 1 and `2.0` equals 2
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
