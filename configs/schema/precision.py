"""The `precision` section of the config."""

from __future__ import annotations

from typing import Literal

from configs.schema.section import Section, result


class PrecisionSection(Section):
    """Number formats; gradients are always reduced in fp32."""

    compute: Literal["bf16", "fp32"] = result("bf16", "of forward and backward")
    params: Literal["fp32", "bf16"] = result("fp32", "of the parameters that the optimizer updates, and of its state")
    deterministic: bool = result(False, "only algorithms that give the same bits each time")
