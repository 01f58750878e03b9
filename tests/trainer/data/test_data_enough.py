"""Too little data: each advice of the error is followed here, and works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from small_data import config, prepared

from configs.config import Config
from configs.errors import UserError
from configs.fingerprint import to_dict


def corpus(folder: Path, *documents: str) -> dict[str, Any]:
    folder.mkdir()
    for i, document in enumerate(documents):
        (folder / f"{i:04}.txt").write_text(document)
    return {"name": "small", "path": str(folder)}


def refused(cfg: Config, cache: Path) -> tuple[str, list[list[str]]]:
    """The error's text, and each advised way as overrides."""
    with pytest.raises(UserError) as e:
        prepared(cache, cfg)
    what, advice = str(e.value).splitlines()
    ways = [re.findall(r"[a-z]+\.[a-z_]+=[0-9.e-]+", way) for way in advice.split(", or ")]
    assert advice.startswith("add documents")
    assert all(ways[1:])
    return what, ways[1:]


def follow(cfg: Config, way: list[str]) -> Config:
    raw = to_dict(cfg)
    for override in way:
        key, value = override.split("=")
        section, name = key.split(".")
        raw[section][name] = float(value) if name == "validation_fraction" else int(value)
    return Config.model_validate(raw)


VALIDATES = {"train__validate_every_steps": 5, "train__early_stop_patience": 2}
LONG = [f"{i} " + "word " * 30 for i in range(3)]


@pytest.mark.parametrize(
    ("documents", "keys", "ways"),
    [
        # Validation: one document; two; many short ones, none of them held out; some shorter than a sample.
        (LONG[:1], {"data__validation_fraction": 0.01, **VALIDATES}, 1),
        (LONG[:2], {"data__validation_fraction": 0.01, **VALIDATES}, 1),
        ([f"{i} words" for i in range(400)], {"data__validation_fraction": 1e-9, **VALIDATES}, 2),
        ([f"{i} words" for i in range(30)], {"data__validation_fraction": 1e-9, **VALIDATES}, 1),
        ([f"{i}" for i in range(60)], {"data__validation_fraction": 0.1, "data__seq_len": 40, **VALIDATES}, 2),
        # Training: all documents are held out, with and without validation, or there are few.
        (LONG[:1], {"data__validation_fraction": 0.999999}, 1),
        (LONG, {"data__validation_fraction": 0.999999, **VALIDATES}, 1),
        (["word " * 5], {"data__seq_len": 64, "data__validation_fraction": 0.0}, 1),
        (["word " * 5], {"data__seq_len": 64, "data__validation_fraction": 0.0, **VALIDATES}, 1),
        (["a", "b" * 30, "c" * 30, "d" * 12], {"data__seq_len": 70, "data__validation_fraction": 0.6}, 2),
        (["a"], {}, 0),
    ],
)
def test_the_advice_works(documents: list[str], keys: dict[str, Any], ways: int, tmp_path: Path) -> None:
    cfg = config(corpus(tmp_path / "corpus", *documents), **keys)
    what, advised = refused(cfg, tmp_path / "cache")
    assert "small" in what or "validation split" in what
    assert len(advised) == ways
    for way in advised:
        prepared(tmp_path / "cache", follow(cfg, way))


def test_one_document_is_not_said_to_need_a_larger_share(tmp_path: Path) -> None:
    what, advised = refused(config(corpus(tmp_path / "corpus", *LONG[:1]), **VALIDATES), tmp_path / "cache")
    assert what.endswith("(a document is not split, and there is one)")
    assert advised == [["train.validate_every_steps=0", "train.early_stop_patience=0"]]
