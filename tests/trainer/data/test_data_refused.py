"""What preparing and opening refuse: no room, too little data, damaged files."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_data import config, prepared, text_folder

from configs.config import Config
from configs.errors import UserError
from trainer.data import files
from trainer.data.open_tokens import open_tokens
from trainer.data.prepare import prepare


def test_a_full_disk_is_a_user_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: files.ArrayWriter, values: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.ArrayWriter, "add", full)
    cfg = config({"name": "t", "path": str(text_folder(tmp_path / "text"))})
    with pytest.raises(UserError, match=r"data.cache: cannot write to .*No space left") as e:
        prepared(tmp_path / "cache", cfg)
    assert len(str(e.value).splitlines()) == 2
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cfg = config({"name": "t", "path": str(text_folder(tmp_path / "text"))})
    with pytest.raises(UserError, match=r"data\.cache: cannot write to"):
        prepared(tmp_path / "file" / "cache", cfg)


def test_a_dead_link_in_the_last_source_is_said_before_the_first_is_tokenised(tmp_path: Path) -> None:
    first, last = text_folder(tmp_path / "first"), text_folder(tmp_path / "last")
    (last / "gone.txt").symlink_to(tmp_path / "gone")
    cfg = config({"name": "first", "path": str(first)}, {"name": "last", "path": str(last)})
    with pytest.raises(UserError, match="'last'"):
        prepared(tmp_path / "cache", cfg)
    assert list((tmp_path / "cache").iterdir()) == []


def small(path: Path, words: str) -> dict[str, Any]:
    path.mkdir()
    (path / "a.txt").write_text(words)
    return {"name": "small", "path": str(path)}


def test_too_little_data_is_refused_by_name(tmp_path: Path) -> None:
    def refuse(cfg: Config, message: str) -> None:
        with pytest.raises(UserError, match=message) as e:
            prepared(tmp_path / "cache", cfg)
        assert len(str(e.value).splitlines()) <= 2

    short = small(tmp_path / "short", "x" * 15)
    refuse(config(short, data__validation_fraction=0.0), "'small' is shorter than one sample: 16 training tokens")
    just = small(tmp_path / "just", "x" * 16)
    assert prepared(tmp_path / "cache", config(just, data__validation_fraction=0.0)).sources
    refuse(config(small(tmp_path / "empty", "")), r"'small' is empty: its files hold no document \(1 empty")
    refuse(
        config(just, data__validation_fraction=0.0, train__validate_every_steps=5),
        "validate_every_steps is 5, but the validation split has 0 tokens",
    )
    refuse(config({**just, "weight": 1e-9}, {**short, "name": "other"}), "the weight 1e-09 of source 'small' is too")


def test_damaged_prepared_data_is_refused(tmp_path: Path) -> None:
    cfg = config({"name": "t", "path": str(text_folder(tmp_path / "text"))})
    path = prepare(cfg, tmp_path / "cache", lambda line: None, lambda: False)
    file = open_tokens(path, cfg).sources[0].folder / "train.npy"
    os.truncate(file, file.stat().st_size - 2)
    with pytest.raises(UserError, match="missing or damaged"):
        open_tokens(path, cfg, patience_s=0.3)
    np.save(file, np.zeros(5, np.uint16))
    with pytest.raises(UserError, match=r"does not hold what its meta\.json says"):
        open_tokens(path, cfg, patience_s=0.0)


def test_files_that_show_late_are_waited_for(tmp_path: Path) -> None:
    """As on a shared filesystem, where rank 0's files appear a little later on other nodes."""
    cfg = config({"name": "t", "path": str(text_folder(tmp_path / "text"))})
    path = prepare(cfg, tmp_path / "cache", lambda line: None, lambda: False)
    hidden = path.with_suffix(".hidden")
    path.rename(hidden)
    timer = threading.Timer(0.3, lambda: hidden.rename(path))
    timer.start()
    assert open_tokens(path, cfg).fingerprints
    timer.join()
