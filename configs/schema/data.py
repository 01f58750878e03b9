"""The `data` section of the config."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import model_validator

from configs.paths import PathText
from configs.schema.section import MILLION, MOST_TOKENS, Section, result, speed

RECORD_KINDS = frozenset({"csv", "parquet", "idx"})


class Source(Section):
    """One source of documents, or of records: rows of tables, labelled images."""

    name: str = result(..., "name in logs, metrics and errors", pattern=r"^[A-Za-z0-9_.-]+$")
    kind: Literal["text", "jsonl", "tokens", "csv", "parquet", "idx"] = result(
        "text",
        "a folder (or file) of text; JSONL with one document a line; .npy files of token ids; tables as CSV or "
        "Parquet; images and labels as MNIST has them",
    )
    path: PathText = result(
        ...,
        "file or folder; `python:stdlib` is the source of Python's own standard library, `python:digits` (kind idx) "
        "and `python:diabetes` (kind csv) are data sets of scikit-learn",
    )
    pattern: str = result("**/*", "which files of a folder, as a glob")
    field: str = result("text", "the key of a JSONL line that holds the document")
    weight: float = result(1.0, "share of the samples, relative to the other sources", gt=0, le=1e12)
    split: Literal["train", "validation", "test"] | None = result(
        None, "which split all records of this source belong to; default: by hash of the content"
    )
    labels: PathText | None = result(
        None, "labels of an idx file of images; default: its name with images -> labels and idx3 -> idx1"
    )

    @property
    def has_records(self) -> bool:
        """Whether the source holds rows of tables or images, not documents."""
        return self.kind in RECORD_KINDS

    @model_validator(mode="after")
    def _of_its_kind(self) -> Source:
        if self.split is not None and not self.has_records:
            raise ValueError(f"split is for csv, parquet and idx: source {self.name!r} has kind {self.kind}")
        if self.labels is not None and self.kind != "idx":
            raise ValueError(f"labels is for idx: source {self.name!r} has kind {self.kind}")
        return self


class DataSection(Section):
    """What is read, and how it is cut into samples."""

    seq_len: int | None = result(None, "tokens per sample, of a task that has tokens", ge=2, le=MOST_TOKENS)
    tokenizer: PathText = result(
        "bytes", "`bytes`, the path of a tokenizer.json, or `none` where all sources are token ids"
    )
    end_token: str | None = result(None, "token that ends a document, if it has no usual one; its number under `none`")
    sources: list[Source] = result(..., "where documents come from", min_length=1)
    validation_fraction: float = result(0.01, "share of documents held out, chosen by hash", ge=0, lt=1)
    test_fraction: float = result(
        0.0, "share of records kept for the test split, chosen by hash; tables and images only", ge=0, lt=1
    )
    document_mask: bool = result(True, "tokens see only their own document")
    cache: PathText | None = speed(None, "folder of prepared samples; default: `.cache` beside the run folder")
    prefetch_steps: int = speed(2, "batches made ahead by the background worker", ge=1, le=MILLION)
    record_samples: bool = speed(False, "write the sample numbers of every step to the attempt's folder")

    @model_validator(mode="after")
    def _without_tokenizer(self) -> DataSection:
        text = next((source.name for source in self.sources if source.kind in ("text", "jsonl")), None)
        if self.tokenizer == "none" and text is not None:
            raise ValueError(f"tokenizer none: source {text!r} holds text, which needs a tokenizer")
        if self.tokenizer == "none" and not re.fullmatch("[0-9]{1,18}", self.end_token or ""):
            raise ValueError("tokenizer none: end_token must give the number of the token that ends a document")
        return self

    @model_validator(mode="after")
    def _records_or_documents(self) -> DataSection:
        records = next((source for source in self.sources if source.has_records), None)
        documents = next((source for source in self.sources if not source.has_records), None)
        if records is not None and documents is not None:
            raise ValueError(
                f"sources: {records.name!r} (kind {records.kind}) holds records, {documents.name!r} "
                f"(kind {documents.kind}) documents: a run reads one or the other"
            )
        if self.test_fraction and documents is not None:
            raise ValueError("test_fraction is for csv, parquet and idx: documents have no test split")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must be below 1: nothing is left to train with")
        return self
