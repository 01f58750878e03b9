"""One rule for values in a shell, in a file and in `--array`. Nothing is silently converted or lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.load import dump, load
from configs.parse import MOST_COPIES, MOST_LEVELS
from configs.typed import list_items
from slurm.submit.array import overrides_of
from tests.machine import takes_at_most

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def make(text: str) -> str:
        (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
        return "a.yaml"

    return make


def refused(argument: str | None, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(argument, list(overrides))
    return str(error.value)


TEXTS = [
    *("12", "007", "1e3", "0x1F", "1:30:00", "on", "no", "2026-01-01", "true", "~", "*.txt", "&a", "!b", "%x", "@y"),
    *("Set #3", "#3", "Q: what", "a: b", "[1", "{", "it's", '"a" and "b"', "'", "- a", "? x", "> y", "a\\nb", "`c`"),
    *(" a", "a ", "ä", "a=b", "|"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_at_a_key_of_text_what_is_typed_is_the_value(text: str, write: Write) -> None:
    config = load("demo", [f"task.sample_prompt={text}", "freeze.frozen=['x']", f"freeze.frozen.0={text}"])
    assert (config.task.sample_prompt, config.freeze.frozen) == (text, [text])
    assert load(write(dump(config)), []) == config


def test_quotes_around_the_whole_are_taken_off_and_nothing_is_no_value() -> None:
    for typed, value in (("'12'", "12"), ('"a # b"', "a # b"), ("'it''s'", "it's"), ("'null'", "null"), ("''", "")):
        assert load("demo", [f"task.sample_prompt={typed}"]).task.sample_prompt == value
    for nothing in ("", "null", " "):
        assert load("demo", ["run.dir=x", f"run.dir={nothing}"]).run.dir is None


@pytest.mark.parametrize(
    ("typed", "value"), [("010", 10), ("0o10", 8), ("+3", 3), ("0x10", 16), (" 7 ", 7), ("1_0", None), ("1:30", None)]
)
def test_numbers_are_the_same_in_a_shell_in_a_file_and_in_an_array(typed: str, value: int | None, write: Write) -> None:
    (((override, _),),) = overrides_of([f"run.seed=[{typed}]"])
    ways: list[tuple[str, list[str]]] = [
        ("demo", [f"run.seed={typed}"]),
        (write(f"include: demo\nrun:\n  seed: {typed}\n"), []),
        ("demo", [override]),
    ]
    for argument, overrides in ways:
        if value is None:
            assert f"run.seed wants a whole number, not the text '{typed}'" in refused(argument, *overrides)
        else:
            assert load(argument, overrides).run.seed == value


def test_text_in_a_file_is_what_stands_there(write: Write) -> None:
    slurm = "slurm: {time: 30, mem: 0200, mail_user: 1e3, sbatch: {gres: 010, nice: on}, srun: [1:30, .5]}\n"
    config = load(write(f"include: demo\nrun: {{name: 007, dir: ~}}\n{slurm}"), [])
    assert (config.run.name, config.run.dir) == ("007", None)
    found = config.slurm
    assert (found.time, found.mem, found.mail_user) == ("30", "0200", "1e3")
    assert (found.sbatch, found.srun) == ({"gres": "010", "nice": "on"}, ["1:30", ".5"])
    assert "run.name wants text, not nothing" in refused(write("include: demo\nrun: {name: ~}\n"))


@pytest.mark.parametrize("value", [*TEXTS[:12], "'12'", '"*.txt"', '"a, b"', "[1, [2]]", "{a: 1, b: [x]}", "Set 3"])
def test_an_array_hands_on_each_item_as_it_was_typed(value: str) -> None:
    words = [w for w in (value, "x") if not w.startswith(("*", "&", "!"))]
    assert list_items(f"[{', '.join(words)}]") == words
    assert [own.typed for (own,) in overrides_of([f"a.b=[{','.join(words)}]"])] == [f"a.b={word}" for word in words]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[*.txt]", "cannot be read"),
        ("[&a x, y]", "needs quotes"),
        ("[!!str 5]", "needs quotes"),
        ("[]", "is empty"),
        ("3", "stands in brackets"),
        ("- a", "stands in brackets"),
        ("[a, b] # c", "stands in brackets"),
        ("[a]]", "cannot be read"),
        ("[a #, b]", "cannot be read"),
    ],
)
def test_what_is_no_list_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        overrides_of([f"run.seed={text}"])
    assert "optim.lr=[1e-3,3e-4]" in str(error.value)


def test_an_array_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    path.write_bytes("\ufeffrun.seed=010\r\n\n  # a comment\nrun.name='Set #3' optim.lr=1e-3\n".encode())
    runs = [["run.seed=010"], ["run.name=Set #3", "optim.lr=1e-3"]]
    assert overrides_of([str(path)]) == [[(text, text) for text in own] for own in runs]
    for data, reason in (
        (b"a=1\nb=caf\xe9\n", ":2: is not UTF-8 text"),
        (b"\xff\xfea\0=\0", ":1: is UTF-16: save it as UTF-8"),
        (b"a=1\n\nb=it's\n", ":3: No closing quotation; quote as in a shell"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=reason):
            overrides_of([str(path)])
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "a pipe"), (".", "a folder"), ("gone", "No such file"), ("a\0", "null byte")):
        with pytest.raises(UserError, match=reason):
            overrides_of([str(tmp_path / name)])


# ---- what could wait, or grow, or be no text


def test_a_config_is_a_regular_file_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    assert refused("pipe") == "pipe: cannot be read: it is a pipe, not a file"
    assert refused("/dev/zero") == "/dev/zero: cannot be read: it is a device, not a file"
    Path("a.yaml").write_text("include: [demo, pipe]\n")
    assert refused("a.yaml") == "pipe: cannot be read: it is a pipe, not a file"
    with open("huge.yaml", "wb") as file:
        file.truncate(1 << 40)
    assert "it is larger than" in refused("huge.yaml")
    assert "there is no file" in refused("a\0.yaml")


def test_bytes_that_are_no_utf_8_and_nul_are_refused_by_key(write: Write) -> None:
    assert (
        refused("demo", os.fsdecode(b"run.name=\xff")) == "command line: run.name=\\xff: holds a byte that is no UTF-8"
    )
    assert "is no UTF-8" in refused("demo", os.fsdecode(b"\xff=1"))
    for text in ('run: {name: "a\\0b"}', 'monitor: {hook: "a\\0b"}', 'slurm: {srun: [x, "\\0"]}'):
        assert "holds a NUL character" in refused(write(f"include: demo\n{text}\n"))
    assert "slurm.srun.1 holds" in refused(write('include: demo\nslurm: {srun: [x, "\\0"]}\n'))


def test_a_terminal_takes_no_orders_from_a_config(write: Write) -> None:
    for text in ('"\\e[2J": 1', '"a\\nb": 1', 'run: {"\\e]0;x\\a": 1}', 'optim: {name: "\\e[2J"}', 'include: "\\e[2J"'):
        shown = refused(write(f"include: demo\n{text}\n" if "include" not in text else text))
        assert all(c.isprintable() for c in shown), shown
    assert "a\\nb" in refused("demo", "a\nb.c=1", "x.a\nb=1").replace("command line: a b", "")


@pytest.mark.parametrize("kind", ["list", "section", "merge"])
def test_aliases_of_aliases_are_bounded_and_the_line_is_named(kind: str, write: Write) -> None:
    lines = ["a0: &a0 " + {"list": "[x]", "section": "{x: 1}", "merge": "{x: 1}"}[kind]]
    for n in range(1, 14):
        ten = {
            "list": f"[{', '.join([f'*a{n - 1}'] * 9)}]",
            "section": "{" + ", ".join(f"k{i}: *a{n - 1}" for i in range(9)) + "}",
            "merge": f"{{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}",
        }[kind]
        lines.append(f"a{n}: &a{n} {ten}")
    messages: list[str] = []
    takes_at_most(5.0, lambda: messages.append(refused(write("\n".join(lines)))))  # without a bound: for ever
    message = messages[0]
    assert f"aliases stand for over {MOST_COPIES:,} values" in message
    assert message.startswith("a.yaml:6: with *a4")


def test_aliases_work_and_each_is_a_value_of_its_own(write: Write) -> None:
    text = "include: demo\nfreeze: {frozen: &f [a, b], trainable: *f}\nrun: {name: &n 12}\ntask: {sample_prompt: *n}\n"
    config = load(write(text), ["freeze.trainable.0=c"])
    assert (config.freeze.frozen, config.freeze.trainable) == (["a", "b"], ["c", "b"])
    assert (config.run.name, config.task.sample_prompt) == ("12", "12")
    assert "a.yaml:2: not valid YAML: found undefined alias" in refused(write("include: demo\nx: *a\n"))
    assert "a.yaml:3: the anchor &a stands twice" in refused(write("include: demo\nx: &a 1\ny: &a 2\n"))


def test_depth_is_bounded(write: Write) -> None:
    for text in ("[" * 200 + "]" * 200, "{a: " * 200 + "1" + "}" * 200):
        assert f"a.yaml:2: more than {MOST_LEVELS} sections or lists" in refused(write(f"include: demo\nx: {text}\n"))
    deep = "\n".join(f"a{n}: &a{n} " + "[" * 60 + (f"*a{n - 1}" if n else "") + "]" * 60 for n in range(9))
    assert f"a.yaml:2: more than {MOST_LEVELS}" in refused(write(deep))
    assert "a.yaml:1: " in refused(write("x: " + "[" * 100_000))


LONG: dict[str, tuple[str, Any]] = {
    "items": ("freeze: {frozen: [%s]}", "x"),
    "wrong items": ("freeze: {frozen: [%s]}", "[1]"),
    "sources": ("data: {sources: [%s]}", "{name: a%d, path: b}"),
    "unknown keys": ("%s", "a%d: 1"),
    "anchors": ("x: [%s]", "&a%d b"),
}


@pytest.mark.parametrize("what", LONG)
def test_reading_is_linear(what: str, write: Write) -> None:
    """Ten times the text takes about ten times as long. Processor time, so that other processes do not count."""
    frame, item = LONG[what]

    def seconds(count: int) -> float:
        items = [item % n if "%d" in item else item for n in range(count)]
        name = write("include: demo\n" + frame % ("\n" if frame == "%s" else ", ").join(items) + "\n")
        begun = time.process_time()
        with nullcontext() if what in ("items", "sources") else pytest.raises(UserError) as error:
            load(name, [])
        spent = time.process_time() - begun
        assert error is None or len(str(error.value).splitlines()) <= 22  # the error fits one screen, whatever the size
        return spent

    seconds(10)
    # Squares would make it 400 times as long. Of three tries one must do: memory may be slow for a moment.
    tries = [(min(seconds(1000) for _ in range(3)), seconds(20_000))]
    while tries[-1][1] >= 20 * 4 * tries[-1][0] + 0.5 and len(tries) < 3:
        tries.append((min(seconds(1000) for _ in range(3)), seconds(20_000)))
    assert tries[-1][1] < 20 * 4 * tries[-1][0] + 0.5, tries
