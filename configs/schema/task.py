"""The `task` section of the config."""

from __future__ import annotations

from typing import ClassVar, Literal

from configs.schema.section import MILLION, MOST_TOKENS, Section, result, speed


class TaskSection(Section):
    """What is learned."""

    needs_tokenizer: ClassVar[bool] = True

    name: Literal["lm"] = result("lm", "language modelling: predict the next token")
    z_loss: float = result(0.0, "weight of the squared log-partition penalty", ge=0, le=1000)
    loss_chunk_tokens: int = speed(1024, "tokens whose logits are held at once", ge=1, le=MOST_TOKENS)
    sample_prompt: str = speed("def ", "begins the text that a finished run writes")
    sample_tokens: int = speed(0, "length of that text; 0: none", ge=0, le=MILLION)
