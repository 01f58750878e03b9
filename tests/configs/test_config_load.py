"""Presets, files, includes and overrides become a config, and what is written back loads as the same config."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, ValidationError
from pydantic.fields import FieldInfo

from configs.config import Config
from configs.fingerprint import fingerprint
from configs.load import dump, load, presets
from configs.parse import Node, Place, Problem, parse
from configs.schema.model import DecoderSection, MlpSection
from configs.schema.section import Section
from configs.schema.sections import Sections
from configs.schema.task import ClassifySection, LmSection, RegressSection
from tests.machine import takes_at_most

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write("name.yaml", text) makes a file and returns its path."""

    def make(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return make


def read(text: str) -> Any:
    """A YAML text as plain values. No problem is allowed."""
    problems: list[Problem] = []
    node = parse(text, lambda line: Place("text", line), problems)
    assert problems == []
    assert isinstance(node, Node)
    return node.plain()


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("12E+3", 12000.0),
        (".5", 0.5),
        ("-1.", -1.0),
        ("007", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("+1", 1),
        ("on", "on"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("1.2.3", "1.2.3"),
        ("True", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("'5'", "5"),
        ("!!str 5", "5"),
        ("<<", "<<"),
        ("[1, a, 1e3]", [1, "a", 1000.0]),
    ],
)
def test_values_are_those_of_yaml_1_2(written: str, value: Any) -> None:
    got = read(f"a: {written}")["a"]
    assert (type(got), got) == (type(value), value)


def test_no_argument_means_the_demo() -> None:
    config = load(None, [])
    assert config == load("demo", [])
    assert config.run_dir == "runs/demo"


def test_a_file_lies_over_what_it_includes(write: Write) -> None:
    write("sub/optim.yaml", "optim: {lr: 1e-2, eps: 1e-6}\nfreeze: {frozen: [a, b]}\n")
    write("data.yaml", "optim: {eps: 1e-7}\nfreeze: {frozen: [c]}\n")
    top = write("top.yaml", "include: [demo, sub/optim.yaml, data.yaml]\noptim:\n  warmup_steps: 3\n")
    config = load(top, [])
    assert (config.optim.lr, config.optim.eps, config.optim.warmup_steps) == (1e-2, 1e-7, 3)
    assert config.freeze.frozen == ["c"]  # a list replaces the list below, it does not extend it
    assert config.model == load("demo", []).model


def test_includes_are_relative_to_the_file_that_names_them(write: Write) -> None:
    write("base.yaml", "include: demo\ntrain: {steps: 7}\n")
    write("a/middle.yaml", "include: ../base.yaml\n")
    assert load(write("b/top.yaml", "include: ../a/middle.yaml\n"), []).train.steps == 7


def test_null_takes_a_section_away(write: Write) -> None:
    assert load("llama3-8b", []).model.rope_scaling is not None
    assert load("llama3-8b", ["model.rope_scaling="]).model.rope_scaling is None
    assert load(write("a.yaml", "include: llama3-8b\nmodel: {rope_scaling: null}"), []).model.rope_scaling is None


def test_overrides() -> None:
    config = load(
        "demo",
        [
            "train.steps=3",
            "train.steps=5",  # the last one wins
            "optim.lr=1",
            "optim.betas=[0, 0.5]",
            "optim.betas.1=0.25",
            "data.sources.0.path=some where=else",
            "model.rope_scaling.factor=32",
            "start.from=runs/a",
            "run.name='12'",  # as the plain 12 would be
            "freeze.frozen=['*']",
            "train.time_limit_s=60",
        ],
    )
    assert config.train.steps == 5
    assert (config.optim.lr, type(config.optim.lr)) == (1.0, float)
    assert config.optim.betas == [0.0, 0.25]
    assert load("demo", ["optim.betas.1=0.5"]).optim.betas == [0.9, 0.5]  # only the schema has the list
    assert load("demo", []).optim.betas == [0.9, 0.95]
    assert config.data.sources[0].path == "some where=else"
    assert config.data.sources[0].name == "stdlib"
    assert config.model.rope_scaling is not None
    assert (config.model.rope_scaling.factor, config.model.rope_scaling.low_freq_factor) == (32.0, 1.0)
    assert config.start.from_ == "runs/a"
    assert config.run.name == "12"
    assert config.freeze.frozen == ["*"]
    assert config.train.time_limit_s == 60.0


def test_sources_can_be_given_whole() -> None:
    config = load("demo", ["data.sources=[{name: a, path: x}, {name: b, path: y}]", "data.sources.1.weight=2"])
    assert [(s.name, s.path, s.weight) for s in config.data.sources] == [("a", "x", 1.0), ("b", "y", 2.0)]


def test_a_file_wins_over_nothing_but_a_preset_name_is_a_preset(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("demo", "nonsense")
    write("mine", "include: demo\ntrain: {steps: 9}")
    monkeypatch.chdir(tmp_path)
    assert load("demo", []).run.name == "demo"
    assert load("mine", []).train.steps == 9


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_byte_order_mark_and_line_endings(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + ending.join(["include: demo", "train:", "  steps: 4", ""]).encode())
    assert load(str(path), []).train.steps == 4


# ---- writing back


def strategy(info: FieldInfo) -> st.SearchStrategy[Any]:
    return values(info.annotation, list(info.metadata))


def values(annotation: Any, limits: list[Any]) -> st.SearchStrategy[Any]:
    """Values that a field accepts, drawn from its annotation and limits."""
    bounds = {name: getattr(m, name) for m in limits for name in ("ge", "gt", "lt", "le") if hasattr(m, name)}
    sizes = {"min": 0, "max": 3} | {
        name[:3]: getattr(m, name) for m in limits for name in ("min_length", "max_length") if hasattr(m, name)
    }
    origin = get_origin(annotation)
    if origin is Literal:
        return st.sampled_from(get_args(annotation))
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return values(inner, limits + [m for one in more for m in getattr(one, "metadata", [one])])
    if origin in (Union, types.UnionType):
        return st.one_of(*[values(a, limits) for a in get_args(annotation)])
    if origin is list:
        return st.lists(values(get_args(annotation)[0], []), min_size=sizes["min"], max_size=sizes["max"])
    if origin is dict:
        return st.dictionaries(TEXT(min_size=1), TEXT(), max_size=sizes["max"])
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(min_value=bounds.get("ge", 0), max_value=bounds.get("le", 2**40))
    if annotation is float:
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
        return st.floats(
            low, high, allow_nan=False, allow_infinity=False, exclude_min="gt" in bounds, exclude_max="lt" in bounds
        )
    if annotation is str:
        pattern = next((m.pattern for m in limits if getattr(m, "pattern", None)), None)
        if any(isinstance(m, AfterValidator) for m in limits):  # a path
            return st.from_regex(r"[^\0~/\ud800-\udfff][^\0\ud800-\udfff]{0,60}", fullmatch=True)
        return st.from_regex(pattern, fullmatch=True) if pattern else TEXT(min_size=sizes["min"]) | TRICKY
    assert issubclass(annotation, Section), annotation
    if annotation is Sections:  # draw a model that fits the task
        whole = {n: strategy(i) for n, i in annotation.model_fields.items()}
        of_task = [{**whole, **{n: values(kind, []) for n, kind in kinds.items()}} for kinds in FITTING]
        return st.one_of([st.fixed_dictionaries(one) for one in of_task])
    return st.fixed_dictionaries({i.alias or n: strategy(i) for n, i in annotation.model_fields.items()})


FITTING: list[dict[str, type[Section]]] = [
    {"model": DecoderSection, "task": LmSection},
    {"model": MlpSection, "task": ClassifySection},
    {"model": MlpSection, "task": RegressSection},
]
TEXT = partial(st.text, st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
# Texts that some version of YAML reads as another type.
PLAIN = (
    "on yes no null ~ 1 1e-4 0o7 1:30 1_000 .inf .nan true << 2026-01-01 - ? : # a:b = & * ! % @ ` ' \" [ { | > , ---"
)
BLANKS = ["a: b", "a #b", " a", "a ", "a\nb", "\n", "\t", "\x01", "\x85", "\u2028", "\ufeff", "\U0001f600", "x" * 300]
TRICKY = st.sampled_from([*PLAIN.split(), *BLANKS])
# Values that satisfy the rules between keys, so that few of the drawn configs are rejected.
RULES: dict[str, dict[str, Any]] = {
    "model": {"heads": 6, "kv_heads": 2, "head_dim": 8, "rope_scaling": None, "max_seq_len": 10**9},
    "optim": {"betas": [0.5, 0.25], "decay_steps": 1},
    "train": {"validate_every_steps": 1, "epochs": None},
    "data": {"validation_fraction": 0.25},
    "parallel": {"engine": "fsdp", "shard": -1, "replicate": 1, "tensor": 1},
    "monitor": {"profile_steps": [3, 5]},
    "freeze": {"schedule": [{"step": 3, "frozen": ["a.*"], "trainable": []}]},
}


DOCUMENTS: dict[str, Any] = {"seq_len": 16, "test_fraction": 0.0}
RECORDS: dict[str, Any] = {"seq_len": None, "test_fraction": 0.5}


@settings(max_examples=60)
@given(values(Sections, []))
def test_what_is_written_loads_as_the_same_config(
    tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, Any]
) -> None:
    tokens = drawn["model"]["name"] == "decoder"
    for section, fixed in RULES.items():
        if section != "model" or tokens:
            drawn[section] |= fixed
    drawn["data"] |= DOCUMENTS if tokens else RECORDS
    kind = {"kind": "jsonl", "split": None, "labels": None} if tokens else {"kind": "idx"}
    drawn["data"]["sources"] = [s | kind | {"name": f"{s['name']}{i}"} for i, s in enumerate(drawn["data"]["sources"])]
    try:
        config = Config.model_validate(drawn)
    except ValidationError as error:
        raise AssertionError(f"the strategy drew a wrong config: {error}") from error
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    again = load(str(path), [])
    assert again == config
    assert fingerprint(again) == fingerprint(config)


@pytest.mark.parametrize("name", presets())
def test_a_preset_written_back_is_the_same(name: str, write: Write) -> None:
    scaled = ["model.rope_scaling.factor=3.5"] if load(name, []).model.name == "decoder" else []
    config = load(name, [*scaled, "start.from='on'"])
    assert load(write("a.yaml", dump(config)), []) == config


def test_dump_is_readable() -> None:
    text = dump(load("demo", []))
    assert [line[:-1] for line in text.splitlines() if line and line[0] != " "] == list(Config.model_fields)
    assert "\n\nmodel:\n  name: decoder\n  vocab_size: 264\n" in text
    assert "  betas: [0.9, 0.95]\n" in text
    assert "  eps: 1e-08\n" in text


# ---- speed


def test_loading_is_fast_and_light() -> None:
    code = (
        "import sys, configs.load as c; c.load('llama3-8b', ['train.steps=1']);"
        "print([m for m in ('torch', 'rich', 'numpy') if m in sys.modules])"
    )

    def start() -> None:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout.strip() == "[]"

    takes_at_most(0.3, start, tries=5)
