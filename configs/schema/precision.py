"""The `precision` section of the config."""

from __future__ import annotations

from typing import Literal

from configs.schema.section import Section, result


class PrecisionSection(Section):
    """Number formats; gradients are always reduced over ranks, and added up over micro batches, in fp32."""

    compute: Literal["bf16", "fp32"] = result("bf16", "of forward and backward")
    params: Literal["fp32", "bf16"] = result("fp32", "of the parameters that the optimizer updates, and of its state")
    tf32: bool = result(False, "fp32 products of a GPU in TF32: up to 8 times faster, with 10 bits of mantissa, not 23")
    deterministic: bool = result(False, "only algorithms that give the same bits each time")
