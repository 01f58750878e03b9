"""The `task` section of the config."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Tag

from configs.schema.own import OwnTask
from configs.schema.section import MILLION, MOST_TOKENS, OWN, Section, by_name, result, speed


class AnyTask(Section):
    """What every task declares."""

    needs_tokenizer: ClassVar[bool] = False  # whether the task needs a tokenizer and `data.seq_len`


class LmSection(AnyTask):
    """Language modelling: predict each next token."""

    needs_tokenizer: ClassVar[bool] = True

    name: Literal["lm"] = result("lm", "language modelling: predict the next token")
    z_loss: float = result(0.0, "weight of the squared log-partition penalty", ge=0, le=1000)
    loss_chunk_tokens: int = speed(1024, "tokens whose logits are held at once", ge=1, le=MOST_TOKENS)
    sample_prompt: str = speed("def ", "begins the text that a finished run writes")
    sample_tokens: int = speed(0, "length of that text; 0: none", ge=0, le=MILLION)


class ClassifySection(AnyTask):
    """Classification: one of several labels for each record."""

    name: Literal["classify"] = result(..., "classification: predict the label of a record")
    label: str = result("label", "the column with the label", min_length=1)
    features: list[str] = result([], "columns of numbers that go in; []: all but the label")
    image: str | None = result(None, "the column with an image that goes in; default: `image`, where the data have it")
    label_smoothing: float = result(0.0, "share of the target that is spread over all labels", ge=0, lt=1)
    class_weights: Literal["none", "balanced"] = result(
        "none", "balanced: a record counts more, the rarer its label is among the training records"
    )


class RegressSection(AnyTask):
    """Regression: a number for each record."""

    name: Literal["regress"] = result(..., "regression: predict a number of a record")
    target: str = result("target", "the column with the number to predict", min_length=1)
    features: list[str] = result([], "columns of numbers that go in; []: all but the target")
    normalise: bool = result(True, "learn with mean 0 and deviation 1 of features and target, as the training data are")


TaskSection = Annotated[
    Annotated[LmSection, Tag("lm")]
    | Annotated[ClassifySection, Tag("classify")]
    | Annotated[RegressSection, Tag("regress")]
    | Annotated[OwnTask, Tag(OWN)],
    by_name("lm"),
]
"""One of these sections, chosen by its `name`; language modelling where no name is given."""
