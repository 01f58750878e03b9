"""A corpus at another path: the prepared data is used if the content is equal, and only then."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_data import config, prepared, text_folder

from configs.errors import UserError
from trainer.data.cached import as_far_as_writable
from trainer.data.open_tokens import tokens_of
from trainer.data.prepared import check_unchanged


def refuse_to_read(*args: Any) -> None:
    raise AssertionError("a file was read again")


def touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_moved_and_renamed_documents_are_the_same_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = text_folder(tmp_path / "text")
    first = prepared(tmp_path / "cache", config({"name": "t", "path": str(folder)}))
    folder.rename(tmp_path / "moved")
    cfg = config({"name": "t", "path": str(tmp_path / "moved")})
    with monkeypatch.context() as patch:  # data prepared before the move is used, once its files were compared
        patch.setattr("trainer.data.prepare.read_file", refuse_to_read)
        assert prepared(tmp_path / "cache", cfg).fingerprints == first.fingerprints
        patch.setattr("trainer.data.cached.hash_file", refuse_to_read)
        assert prepared(tmp_path / "cache", cfg).fingerprints == first.fingerprints
    (tmp_path / "moved" / "part0" / "000.txt").rename(tmp_path / "moved" / "part0" / "000a.txt")
    assert prepared(tmp_path / "cache", cfg).fingerprints == first.fingerprints
    assert len(list((tmp_path / "cache").glob("t-*"))) == 2
    monkeypatch.setattr("trainer.data.prepare.read_file", refuse_to_read)
    assert prepared(tmp_path / "cache", cfg).fingerprints == first.fingerprints


def test_files_elsewhere_of_the_same_size_and_time_are_another_source(tmp_path: Path) -> None:
    """Shards have equal sizes, and copying tools set equal times: only the content distinguishes them."""
    found = []
    for name, first_id in (("a", 5), ("b", 105)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "shard.npy", np.array([first_id, first_id + 1, 256] * 50))
        os.utime(tmp_path / name / "shard.npy", ns=(10**18, 10**18))
        source = {"name": "ids", "kind": "tokens", "path": str(tmp_path / name)}
        found.append(prepared(tmp_path / "cache", config(source, data__validation_fraction=0.0)))
    assert [tokens_of(p.sources[0], "train").tokens[0] for p in found] == [5, 105]
    with pytest.raises(UserError, match=r"'ids' changed since this run began: 1 file changed \(shard\.npy\)"):
        check_unchanged(found[0].fingerprints, found[1])


def test_copies_of_a_source_share_a_cache_and_each_is_compared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, mine, theirs = tmp_path / "cache", text_folder(tmp_path / "mine"), text_folder(tmp_path / "theirs")
    for file in theirs.rglob("*.txt"):
        touch(file)
    configs = [config({"name": "t", "path": str(folder)}) for folder in (mine, theirs)]
    first = prepared(cache, configs[0])
    with monkeypatch.context() as patch:
        patch.setattr("trainer.data.prepare.read_file", refuse_to_read)
        prepared(cache, configs[1])
        patch.setattr("trainer.data.cached.hash_file", refuse_to_read)
        for cfg in configs * 2:
            assert prepared(cache, cfg).fingerprints == first.fingerprints
    file = theirs / "part0" / "000.txt"
    file.write_bytes(b"X" + file.read_bytes()[1:])  # of the same size
    assert prepared(cache, configs[1]).fingerprints != first.fingerprints
    assert prepared(cache, configs[0]).fingerprints == first.fingerprints


def test_what_a_closed_cache_does_not_take_is_passed_over_and_a_full_disk_is_not() -> None:
    for number in (errno.EROFS, errno.EACCES, errno.EPERM):
        with as_far_as_writable():
            raise OSError(number, os.strerror(number))
    with pytest.raises(OSError, match="No space left"), as_far_as_writable():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
