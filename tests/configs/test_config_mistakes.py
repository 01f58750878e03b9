"""Every mistake gets one line: where it is, what is wrong, what to write instead. All mistakes are reported at once."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.explain import ELSEWHERE, all_keys, nearest
from configs.load import load, presets

Mistakes = Callable[..., list[str]]


def mistakes(argument: str | None, *overrides: str) -> list[str]:
    """The lines of the error that loading raises. A header over several lines is checked and removed."""
    with pytest.raises(UserError) as error:
        load(argument, list(overrides))
    lines = str(error.value).split("\n")
    if len(lines) > 1:
        assert lines.pop(0) == f"{len(lines)} mistakes in the config:"
    text = "\n".join(lines)
    for jargon in ("pydantic", "http", "Input should", "validation", "dict", "str ", "NoneType", "Traceback"):
        assert jargon not in re.sub("validation_fraction|train, validation or test", "", text), text
    return lines


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """file(text) makes a.yaml in the current folder."""
    monkeypatch.chdir(tmp_path)

    def make(text: str) -> str:
        (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
        return "a.yaml"

    return make


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("include: demo\ntrain:\n  step: 3\n", "a.yaml:3: unknown key train.step; did you mean train.steps?"),
        (
            "include: demo\ntrain:\n\n  time_limit: 3\n",
            "a.yaml:4: unknown key train.time_limit; did you mean train.time_limit_s?",
        ),
        (
            "include: demo\ndata:\n  sources:\n    - name: a\n      path: b\n      wieght: 2\n",
            "a.yaml:6: unknown key data.sources.0.wieght; did you mean data.sources.0.weight?",
        ),
        (
            "include: demo\ntrain:\n  steps: 3\n  lr: 1\n  steps: 4\n",
            "a.yaml:5: the key steps stands twice, first in line 3",
        ),
        (
            "include: demo\ntrain:\n  steps: '200'\n",
            "a.yaml:3: train.steps wants a whole number, not the text '200'; write 200, without quotes",
        ),
        (
            "include: demo\ntrain:\n  time_limit_s: 2h\n",
            "a.yaml:3: train.time_limit_s wants a number of seconds, not the text '2h'; write 7200",
        ),
        ("include: demo\nmodel:\n", "a.yaml:2: model is empty: give its keys or remove the line"),
        ("include: demo\nmodel: 3\n", "a.yaml:2: model wants a section of keys, not 3"),
        (
            "include: demo\ndata:\n  sources:\n    - name: a\n",
            "a.yaml:4: data.sources.0.path is missing (file or folder; `python:stdlib` is the source of Python's own "
            "standard library, `python:digits` (kind idx) and `python:diabetes` (kind csv) are data sets of "
            "scikit-learn)",
        ),
        ("include: demo\nfreeze: {include: x}\n", "a.yaml:2: `include` stands at the top of a file, not here"),
        ("include: 3\n", "a.yaml:1: include wants a preset or a file, not 3"),
        ("include: a.yaml\n", "a.yaml:1: include goes in a circle: a.yaml -> a.yaml"),
        (
            "# hm\ninclude: dmeo\n",
            "a.yaml:2: there is no preset 'dmeo'; did you mean demo? (presets: " + ", ".join(presets()) + ")",
        ),
        ("", "a.yaml: is empty"),
        ("# nothing\n", "a.yaml: is empty"),
        ("- a\n- b\n", "a.yaml:1: expected lines of `key: value`, not the list ['a', 'b']"),
        ("hello\n", "a.yaml:1: expected lines of `key: value`, not the text 'hello'"),
        ("a: 1\n---\nb: 2\n", "a.yaml:2: a second document begins here; a file holds one config"),
        (
            "train:\n\tsteps: 3\n",
            "a.yaml:2: not valid YAML: found character that cannot start any token; indent with spaces, not tabs",
        ),
        (
            "optim:\n  betas: [0.9,\n  lr: 3\n",
            "a.yaml:4: not valid YAML: did not find expected ',' or ']'; begun in line 2",
        ),
        ("a: \x01\n", "a.yaml:1: not valid YAML: the character U+0001 is not allowed"),
        (
            "freeze: {frozen: &a [*a]}\ninclude: demo\n",
            "a.yaml:1: an alias of something that holds it",
        ),
        (
            "include: demo\nrun: {name: !!python/object/apply:os.getcwd []}\n",
            "a.yaml:2: the tag tag:yaml.org,2002:python/object/apply:os.getcwd is not known here; configs hold plain "
            "data only",
        ),
    ],
)
def test_in_a_file(file: Callable[[str], str], text: str, line: str) -> None:
    assert line in mistakes(file(text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=1", "unknown key optimizer.lr; did you mean optim.lr?"),
        ("lr=1", "unknown key lr; did you mean optim.lr?"),
        ("learning_rate=1", "unknown key learning_rate; did you mean optim.lr?"),
        ("train.batch_size=1", "unknown key train.batch_size; did you mean train.global_batch?"),
        ("start.from_=x", "unknown key start.from_; did you mean start.from?"),
        ("train.stop_grace=1", "unknown key train.stop_grace; did you mean run.stop_grace_s?"),
        (
            "qqqq.zzzz=1",
            "unknown key qqqq.zzzz; valid here: run, model, start, data, task, train, optim, precision, parallel, "
            "freeze, checkpoint, monitor, slurm",
        ),
        (
            "peft.type=lora",
            "unknown key peft.type; valid here: run, model, start, data, task, train, optim, precision, parallel, "
            "freeze, checkpoint, monitor, slurm",
        ),
        ("train.steps", "expected key=value, for example train.steps=100"),
        ("=3", "expected key=value, for example train.steps=100"),
        ("train..steps=3", "expected key=value, for example train.steps=100"),
        ("train.steps=", "train.steps wants a whole number, not nothing"),
        ("train.steps=3.0", "train.steps wants a whole number, not 3.0; write 3"),
        ("train.steps=2.5", "train.steps wants a whole number, not 2.5"),
        ("train.steps=true", "train.steps wants a whole number, not true"),
        ("train.steps=1_000", "train.steps wants a whole number, not the text '1_000'; write 1000, without quotes"),
        ("train.steps=-1", "train.steps must be at least 0, not -1"),
        ("train.steps.x=1", "train.steps wants a whole number, not a section of keys"),
        ("optim.lr='3e-4'", "optim.lr wants a number, not the text '3e-4'; write 3e-4, without quotes"),
        ("optim.lr=0", "optim.lr must be above 0, not 0"),
        ("optim.lr=.inf", "optim.lr wants a finite number, not inf"),
        ("optim.lr=1e999", "optim.lr wants a finite number, not inf"),
        (
            "train.time_limit_s=90 min",
            "train.time_limit_s wants a number of seconds, not the text '90 min'; write 5400",
        ),
        ("run.tensorboard=on", "run.tensorboard wants true or false, not the text 'on'"),
        ("run.name=null", "run.name wants text, not nothing"),
        ("run.name=", "run.name wants text, not nothing"),
        ("run.name=''", "run.name must not be empty, not the text ''"),
        ("optim.betas=[0.9]", "optim.betas needs at least 2 item(s), not the list [0.9]"),
        ("optim.betas=0.9", "optim.betas wants a list, not 0.9"),
        ("optim.betas.1=x", "optim.betas.1 wants a number, not the text 'x'"),
        ("optim.betas.2=0", "optim.betas has items 0 to 1, not '2'"),
        ("optim.name=adamx", "optim.name must be one of adamw, adam, sgd or muon, not the text 'adamx'"),
        ("data.sources=[]", "data.sources needs at least 1 item(s), not an empty list"),
        ("data.sources.first.path=x", "data.sources has items 0 to 0, not 'first'"),
        ("data.sources.0.name=a b", "data.sources.0.name must match ^[A-Za-z0-9_.-]+$, not the text 'a b'"),
        ("optim.schedule=wsd", "optim: schedule wsd needs decay_steps"),
        ("freeze.frozen=[*a]", "not valid YAML: found undefined alias; text that begins with * or & needs quotes"),
        ("freeze.frozen=[1", "a list or section must end with its bracket"),
        ("freeze.frozen=[[1]", "not valid YAML: did not find expected ',' or ']'"),
        ("freeze.frozen=[a] # b", "a list or section must end with its bracket"),
        ("train.steps=10 # as before", "train.steps wants a whole number, not the text '10 # as before'"),
        ("optim.betas.²=0", "optim.betas has items 0 to 1, not '²'"),
        ("optim.betas.1234567890=0", "optim.betas has items 0 to 1, not '1234567890'"),
        ("include=demo", "`include` stands at the top of a file, not here"),
    ],
)
def test_on_the_command_line(override: str, message: str) -> None:
    assert mistakes("demo", override) == [f"command line: {override}: {message}"]


FIT = ["task={name: classify}", "data={sources: [{name: a, kind: idx, path: python:digits}]}"]
HIDDEN = "unknown key model.hidden: model.name is decoder, and only mlp has it"


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["model.hidden=[3]"], [HIDDEN]),
        (["model.name=decoder", "model.hidden=3"], [HIDDEN]),
        (["model.name=cnn", "model.hidden=3"], ["model.name must be one of decoder, mlp or own, not the text 'cnn'"]),
        (["model.name=null"], ["model.name must be one of decoder, mlp or own, not nothing"]),
        (["model.name=[mlp]"], ["model.name must be one of decoder, mlp or own, not the text '[mlp]'"]),
        (["task.name=lms"], ["task.name must be one of lm, classify, regress or own, not the text 'lms'"]),
        (["task.target=y"], ["unknown key task.target: task.name is lm, and only regress has it"]),
        (["task.features=[]"], ["unknown key task.features: task.name is lm, and only classify and regress have it"]),
        ([*FIT, "model={name: mlp, hidden_size: 3}"], ["unknown key model.hidden_size; did you mean model.hidden?"]),
        ([*FIT, "model={name: mlp, qqqqqqq: 3}"], ["unknown key model.qqqqqqq; valid here: name, features, hidden, "]),
        (["model={name: mlp, hidden: [8, x]}"], ["model.hidden.1 wants a whole number, not the text 'x'"]),
        (["model={name: mlp, hidden: [0]}"], ["model.hidden.0 must be at least 1, not 0"]),
        (["model={name: mlp}", "model.hidden.0=x"], ["model.hidden.0 wants a whole number, not the text 'x'"]),
        (["parallel.engine=zero", "optim.l1=1"], ["parallel.engine zero updates inside DeepSpeed, optim.l1 cannot be"]),
        (["model={name: mlp}"], ["task.name lm needs model.name decoder, not mlp"]),
        (["task={name: classify}"], ["task.name classify needs model.name mlp, not decoder"]),
        (
            ["model={name: mlp}", "task={name: regress}", "parallel.shard=1", "parallel.tensor=2"],
            ["parallel.tensor 2 has no way to split model.name mlp: it must be 1"],
        ),
    ],
)
def test_of_sections_that_a_name_chooses(overrides: list[str], messages: list[str]) -> None:
    lines = mistakes("demo", *overrides)
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert message in line
        assert line.startswith("command line: ")


def test_a_model_of_another_name_has_none_of_the_files_keys() -> None:
    lines = mistakes("demo", "model.name=mlp", "model.hiden=[3]")
    assert "unknown key model.vocab_size: model.name is mlp, and only decoder has it" in lines[0]
    assert "configs/presets/demo.yaml:" in lines[0]
    assert lines[-1] == "command line: model.hiden=[3]: unknown key model.hiden; did you mean model.hidden?"
    assert load("demo", [*FIT, "model={name: mlp}"]).model.hidden == [64]
    assert load("demo", [*FIT, "model={name: mlp}", "model.hidden.0=8"]).model.hidden == [8]


def test_all_at_once(file: Callable[[str], str]) -> None:
    lines = mistakes(
        file("include: [demo, nowhere.yaml]\ntrain:\n  steps: many\n  lr: 1\noptim: {name: adm}\nseed: 3\n"),
        "model.dims=3",
        "foo",
        "data.seq_len=1",
    )
    assert [line.split(": ")[0] for line in lines] == ["a.yaml:1", "a.yaml:3", "a.yaml:4", "a.yaml:5", "a.yaml:6"] + [
        "command line"
    ] * 3
    assert lines[0].startswith("a.yaml:1: there is no file nowhere.yaml")
    assert lines[4] == "a.yaml:6: unknown key seed; did you mean run.seed?"
    assert [line.split(": ")[1] for line in lines[5:]] == ["model.dims=3", "foo", "data.seq_len=1"]  # as given


def test_what_could_not_be_read_hides_nothing_else_but_what_is_missing(file: Callable[[str], str]) -> None:
    lines = mistakes(file("include: gone.yaml\noptim: {lr: 0}\n"), "run.seed=x")
    assert [line.split(":")[0] for line in lines] == ["a.yaml", "a.yaml", "command line"]
    assert not any("missing" in line for line in lines)


def test_missing_keys_say_what_they_are(file: Callable[[str], str]) -> None:
    lines = mistakes(file("model: {vocab_size: 9, layers: 1, heads: 2, mlp_dim: 8, max_seq_len: 8}\n"))
    assert lines == [
        "a.yaml: data is missing (what is read)",
        "a.yaml: train is missing (how long and in what batches)",
        "a.yaml:1: model.dim is missing (width of the residual stream)",
    ]


def test_a_mistake_in_an_included_file_names_that_file(tmp_path: Path, file: Callable[[str], str]) -> None:
    (tmp_path / "base.yaml").write_text("include: demo\n\noptim:\n  lr: fast\n")
    assert mistakes(file("include: base.yaml\n")) == ["base.yaml:4: optim.lr wants a number, not the text 'fast'"]


def test_longer_circle(tmp_path: Path, file: Callable[[str], str]) -> None:
    (tmp_path / "b.yaml").write_text("include: [demo, a.yaml]\n")
    assert mistakes(file("include: b.yaml\n")) == ["b.yaml:1: include goes in a circle: a.yaml -> b.yaml -> a.yaml"]


def test_rules_between_keys_name_all_places(file: Callable[[str], str]) -> None:
    path = file("include: demo\nmodel:\n  dim: 130\n")
    assert mistakes(path, "model.heads=3") == [
        "command line: model.heads=3: model: dim 130 is not a multiple of heads 3; give head_dim (see also a.yaml:3)"
    ]
    (line,) = mistakes(path, "model.heads=5", "data.seq_len=300")
    assert line.startswith("command line: data.seq_len=300: data.seq_len 300 is longer than model.max_seq_len 256 (see")
    assert "configs/presets/demo.yaml:" in line


def test_unreadable(tmp_path: Path, file: Callable[[str], str]) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"run:\n  name: caf\xe9\n")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "folder").mkdir()
    assert mistakes("latin.yaml") == ["latin.yaml:2: is not UTF-8 text"]
    assert mistakes("loop.yaml")[0].startswith("command line: there is no file loop.yaml")
    assert mistakes("folder") == ["command line: folder is a folder; name a YAML file"]
    (tmp_path / "folder" / "config.yaml").write_text("")
    assert mistakes("folder") == ["command line: folder is a folder; did you mean folder/config.yaml?"]
    assert mistakes("x" * 5000 + ".yaml")[0].startswith("command line: there is no file")
    with socket.socket(socket.AF_UNIX) as listener:  # a file that even root cannot read
        listener.bind("socket.yaml")
        assert mistakes("socket.yaml")[0].startswith("socket.yaml: cannot be read: ")


def test_unknown_preset_names_the_nearest_and_lists_all() -> None:
    for argument, near in (
        ("llama3_8b", "llama3-8b"),
        ("llama-70b", "llama3-70b"),
        ("configs/presets/demos.yaml", "demo"),
    ):
        (line,) = mistakes(argument)
        assert f"did you mean {near}? (presets: {', '.join(presets())})" in line
    assert "did you mean" not in mistakes("qwertz")[0]
    assert mistakes("_llama3")[0].startswith("command line: there is no preset '_llama3'")  # it is only for including


def test_every_misspelt_key_finds_its_own() -> None:
    """A name without its last letter, or with two letters swapped, still leads to the right key."""
    for key in all_keys():
        parent, dot, name = key.replace("*", "0").rpartition(".")
        for wrong in (name[:-1], name[1] + name[0] + name[2:]):
            if len(name) > 3 and parent + dot + wrong not in all_keys():
                assert nearest(parent + dot + wrong) == parent + dot + name, wrong
    assert set(ELSEWHERE.values()) <= set(all_keys())


WRONG: list[Any] = ["", "x", "'5'", "-7", "2.5", "true", "[]", "[x, [1]]", "{a: 1}", "", ".nan", "1e400", "2026-01-01"]
LEAVES = [key.replace("*", "0") for key in all_keys()]


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(LEAVES), st.sampled_from(WRONG)), min_size=1, max_size=4))
def test_any_value_anywhere_is_taken_or_explained(drawn: list[tuple[str, str]]) -> None:
    overrides = [f"{key}={value}" for key, value in drawn]
    try:
        load("demo", overrides)
    except UserError:
        for line in mistakes("demo", *overrides):
            # own name: the file's keys are not known
            own = {("model.name", "{a: 1}"), ("task.name", "{a: 1}")} & {*drawn}
            assert line.startswith("command line: ") or own  # file's keys are unknown
