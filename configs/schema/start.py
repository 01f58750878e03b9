"""The `start` section of the config."""

from __future__ import annotations

from typing import Literal

from configs.paths import PathText
from configs.schema.section import Section, result


class AllowSection(Section):
    """What `start.from` may differ in: globs over parameter names. They apply to their optimizer state too."""

    missing: list[str] = result([], "not in the checkpoint: these begin with initial values")
    unexpected: list[str] = result([], "only in the checkpoint: these are left out")
    reshaped: list[str] = result([], "of another shape: what both have is kept, the rest begins with initial values")
    dtype: list[str] = result([], "stored in a wider number format: these are rounded")
    replaced: list[str] = result([], "these begin with initial values although the checkpoint has them")


class StartSection(Section):
    """Where a new run begins. It is read only while the run folder holds no committed checkpoint."""

    from_: PathText | None = result(None, "a run folder or a checkpoint to begin from", alias="from")
    take: Literal["weights", "everything"] = result(
        "weights", "`weights` starts at step 0; `everything` carries optimizer, step and data position on"
    )
    rename: dict[str, str] = result(
        {}, "names in the checkpoint -> names here; each `*` of one stands for that of the other"
    )
    allow: AllowSection = result(AllowSection(), "which differences are wanted; any other is refused")
