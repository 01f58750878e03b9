"""The presets are as they claim, and the files made from the schema are current."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from configs.config import Config
from configs.fingerprint import fields
from configs.load import FOLDER, load, presets
from configs.reference import SCHEMA_FILE, contents, json_schema
from configs.schema.model import DecoderSection

SHARED = {"model.name", "model.norm", "model.norm_eps", "model.dropout", "task.name"}  # keys of several models or tasks


def parameters(m: DecoderSection) -> int:
    """Parameters of a Llama-like decoder, counted from its shape."""
    head_dim = m.head_dim or m.dim // m.heads
    attention = 2 * m.dim * head_dim * (m.heads + (m.kv_heads or m.heads))
    block = attention + 3 * m.dim * m.mlp_dim + 2 * m.dim
    return m.vocab_size * m.dim * (1 if m.tie_embeddings else 2) + m.layers * block + m.dim


@pytest.mark.parametrize(
    ("name", "count", "factor"),
    [  # the counts in Meta's model cards and on Hugging Face
        ("llama3-1b", 1_235_814_400, 32.0),
        ("llama3-8b", 8_030_261_248, 8.0),
        ("llama3-70b", 70_553_706_496, 8.0),
        ("llama3-405b", 405_853_388_800, 8.0),
    ],
)
def test_llama(name: str, count: int, factor: float) -> None:
    config = load(name, [])
    assert parameters(config.model) == count
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == factor
    assert config.model.rope_theta == 500_000.0
    assert config.run.name == name
    assert config.train.global_batch * config.data.seq_len == 2**22


def test_demo_is_small() -> None:
    assert 0.8e6 < parameters(load("demo", []).model) < 1.2e6


def test_all_presets_are_listed_and_begin_with_the_schema() -> None:
    assert presets() == [
        *("demo", "demo-freeze", "digits-mlp"),
        *("llama3-1b", "llama3-405b", "llama3-70b", "llama3-8b", "regression-mlp"),
    ]
    for path in FOLDER.glob("*.yaml"):
        first = path.read_text("utf-8").splitlines()[0]
        assert first == f"# yaml-language-server: $schema=../{SCHEMA_FILE.name}", path


@pytest.mark.parametrize("path", contents(), ids=lambda path: path.name)
def test_what_is_made_from_the_schema_is_current(path: Path) -> None:
    assert path.read_text("utf-8") == contents()[path], "run `make schema`"


def test_the_reference_names_every_key() -> None:
    text = next(text for path, text in contents().items() if path.suffix == ".md")
    for key, _, changes in fields(load("demo", ["model.rope_scaling.factor=2"])):
        rows = [line for line in text.splitlines() if line.startswith(f"| `{key}` ")]
        assert len(rows) == 1 or key in SHARED
        assert all(f"| {changes} |" in row for row in rows)


def test_the_reference_has_a_table_for_each_model_and_task() -> None:
    text = next(text for path, text in contents().items() if path.suffix == ".md")
    for title, key in (
        ("model: decoder", "model.dim"),
        ("model: mlp", "model.hidden"),
        ("task: regress", "task.target"),
    ):
        _, _, after = text.partition(f"### {title}\n")
        table = after.partition("\n#")[0]
        assert f"| `{key}` |" in table
        assert f"| `{key.partition('.')[0]}.name` | `{title.rpartition(' ')[2]}` |" in table


def test_the_schema_admits_a_part_of_a_config() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == {"include", *Config.model_fields}
    for section in [schema, *schema["$defs"].values()]:
        assert "required" not in section
        assert section["additionalProperties"] is False


def test_make_schema_writes_both_files(tmp_path: Path) -> None:
    code = (
        "import configs.reference as r, pathlib, sys; root = pathlib.Path(sys.argv[1]); old = r.ROOT; r.ROOT = root;"
        "r.SCHEMA_FILE, r.REFERENCE_FILE = root / 'configs' / 'a.json', root / 'docs' / 'a.md'; r.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=FOLDER.parent
    )
    assert done.stdout.split() == ["wrote", "configs/a.json", "wrote", "docs/a.md"]
    assert sorted((tmp_path / "docs" / "a.md", tmp_path / "configs" / "a.json")) == sorted(tmp_path.rglob("a.*"))
