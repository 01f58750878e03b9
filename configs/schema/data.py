"""The `data` section of the config."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import model_validator

from configs.paths import PathText
from configs.schema.section import MILLION, MOST_TOKENS, Section, result, speed


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

    seq_len: int | None = result(None, "tokens per sample, of a task that has tokens", ge=2, le=MOST_TOKENS)
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
