"""Existing token ids need no tokenizer, only the id that ends a document."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_data import bpe, config, prepared

from configs.errors import UserError
from configs.load import load
from trainer.data import files
from trainer.data.open_tokens import tokens_of
from trainer.life.folder import RunFolder
from trainer.preflight import check, check_folder, write_config

README = Path(__file__).parents[3] / "README.md"


def ids(path: Path, end_token: int, documents: int = 40, dtype: str = "<u4") -> dict[str, Any]:
    path.mkdir()
    for i in range(documents):
        np.save(path / f"{i:03}.npy", np.array([*range(20, 40 + i), end_token], dtype=dtype))
    return {"name": "ids", "kind": "tokens", "path": str(path)}


def test_readmes_own_command_takes_a_folder_of_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, with another path, in a folder without a tokenizer.json."""
    (line,) = [line for line in README.read_text().splitlines() if " -m trainer llama3-8b " in line]
    words = shlex.split(line.replace("/data/tokens", f"{tmp_path}/tokens").replace("/shared", str(tmp_path)))
    preset, *overrides = words[words.index("trainer") + 1 :]
    monkeypatch.chdir(tmp_path)
    cfg = load(preset, overrides)
    (tmp_path / "tokens").mkdir()
    held_out = False
    for i in range(100_000):  # until a document's hash is below the held-out share
        document = np.full(10_000, i, dtype="<u4")
        share = int.from_bytes(hashlib.blake2b(document.data, digest_size=16).digest()[:8], "little") / 2**64
        if i == 0 or share < cfg.data.validation_fraction:
            np.save(tmp_path / f"tokens/{i}.npy", np.append(document, int(cfg.data.end_token or 0)))
            held_out = held_out or i > 0
        if held_out:
            break
    assert check(cfg, 8, RunFolder(Path(cfg.run_dir))) == []
    source = prepared(tmp_path / "cache", cfg).sources[0]
    assert tokens_of(source, "train").tokens.tolist() == [0] * 10_000 + [128001]
    assert len(tokens_of(source, "validation").tokens) == 10_001


def test_ids_are_checked_against_the_models_vocabulary_alone(tmp_path: Path) -> None:
    source = ids(tmp_path / "ids", end_token=0)
    keys = {"data__tokenizer": "none", "data__end_token": "0"}
    p = prepared(tmp_path / "cache", config(source, **keys))
    assert p.facts["tokenizer"]["end_token"] == 0
    assert sum(len(tokens_of(p.sources[0], side).starts) for side in ("train", "validation")) == 40
    small = config(source, **keys, model__vocab_size=60)
    with pytest.raises(UserError, match="token id 60 at position 40 is beyond the vocabulary"):
        prepared(tmp_path / "elsewhere", small)
    # They fit the model that they were prepared for. A folder of an older Muster does not record the largest id.
    with pytest.raises(UserError, match="holds token id 78, beyond the vocabulary"):
        prepared(tmp_path / "cache", small)
    meta = files.read_json(p.sources[0].folder / "meta.json")
    assert meta.pop("largest_id") == 78
    files.write_json(p.sources[0].folder / "meta.json", meta)
    with pytest.raises(UserError, match="holds token id 78, beyond the vocabulary"):
        prepared(tmp_path / "cache", small)
    assert files.read_json(p.sources[0].folder / "meta.json")["largest_id"] == 78
    with pytest.raises(UserError, match=r"data\.end_token 300 is beyond the vocabulary: model\.vocab_size is 300"):
        prepared(tmp_path / "cache", config(source, **keys | {"data__end_token": "300"}))


@pytest.mark.parametrize(
    ("sources", "keys", "said"),
    [
        (["tokens"], {"data__end_token": None}, "end_token must give the number of the token that ends a document"),
        (["tokens"], {"data__end_token": "</s>"}, "end_token must give the number of the token that ends a document"),
        (["tokens", "text"], {}, "source 'text' holds text, which needs a tokenizer"),
        (["tokens"], {"task__sample_tokens": 5}, "sample_tokens needs a data.tokenizer"),
    ],
)
def test_what_needs_a_tokenizer_says_so(sources: list[str], keys: dict[str, Any], said: str) -> None:
    chosen = [{"name": kind, "kind": kind, "path": "x"} for kind in sources]
    with pytest.raises(ValueError, match=said):
        config(*chosen, **{"data__tokenizer": "none", "data__end_token": "0", **keys})


def test_a_run_that_named_a_tokenizer_for_its_ids_goes_on_without_it(tmp_path: Path) -> None:
    """As the presets did before. The prepared ids are equal, so their fingerprint is equal too."""
    source = ids(tmp_path / "ids", end_token=0)
    old = config(source, data__tokenizer=str(bpe(tmp_path / "t.json")))
    new = config(source, data__tokenizer="none", data__end_token="0")
    assert prepared(tmp_path / "cache", old).fingerprints == prepared(tmp_path / "cache", new).fingerprints
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    write_config(old, folder)
    assert {(e["event"], e["key"]) for e in check_folder(new, folder)} == {
        ("data_moved", "data.tokenizer"),
        ("data_moved", "data.end_token"),
    }
    text = [{"name": "t", "path": str(tmp_path)}]
    write_config(config(*text, data__tokenizer=str(tmp_path / "t.json")), folder)
    with pytest.raises(UserError, match="another config"):  # where text is tokenised, it would be another run
        check_folder(config(*text, data__tokenizer="bytes"), folder)
