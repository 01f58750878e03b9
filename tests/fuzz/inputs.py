"""Inputs of a command: a config, words of a command line, variables of the environment.

Each target returns whether the input was used; False means that it was refused with words. Any exception is a defect.
The expected value is computed by other code than the code under test.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from configs.config import Config
from configs.errors import UserError
from configs.fingerprint import to_dict
from configs.load import dump, load
from launch.monitor.devices import count_visible, named
from slurm.submit.array import Override, labels, overrides_of
from trainer.__main__ import parse
from trainer.host import cgroups, processors
from trainer.host import environment as env

_NULLS = ("", "~", "null", "Null", "NULL")
_PATHS = {"run.dir", "start.from", "data.tokenizer", "data.cache", "slurm.container", "slurm.python"}


def _refused(error: UserError) -> bool:
    """Check that the refusal is a few lines that give a reason. Returns False: not used."""
    assert str(error).strip(), "refused without a word"
    assert str(error).count("\n") < 60, "too many lines to read"
    return False


# ---- configs ---------------------------------------------------------------------------------------------------------


def config(data: bytes) -> bool:
    """A config file's bytes."""
    with tempfile.TemporaryDirectory(prefix="muster-fuzz-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(data)
        try:
            found = load(str(path), [])
        except UserError as error:
            return _refused(error)
        _same_again(found, path)
        for key, written in _leaves(yaml.load(data.decode("utf-8-sig"), _AllText), ()):
            value = _value(found, key)
            assert not isinstance(value, str) or value in (written, os.path.expanduser(written)), (key, written, value)
            assert value is not None or written in _NULLS, (key, written)
        return True


class _AllText(getattr(yaml, "CBaseLoader", yaml.BaseLoader)):  # type: ignore[misc]
    """Loads every value as text."""


def _same_again(found: Config, path: Path) -> None:
    """Check that the written config loads as the same config."""
    for ascii_only in (False, True):
        path.write_text(dump(found, ascii_only), "utf-8")
        assert load(str(path), []) == found, "what is written down is another config"


def _leaves(node: Any, key: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    if isinstance(node, dict):
        return [leaf for name, inner in node.items() for leaf in _leaves(inner, (*key, name))]
    if isinstance(node, list):
        return [leaf for index, inner in enumerate(node) for leaf in _leaves(inner, (*key, str(index)))]
    return [(key, node)] if key and key[0] != "include" else []


def _value(found: Config, key: tuple[str, ...]) -> Any:
    """The value at a key. An `include` or a merge key has none that is known."""
    node: Any = to_dict(found)
    for part in key:
        if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            raise AssertionError(f"{'.'.join(key)} is in the file and not in the config")
    return node


# ---- overrides -------------------------------------------------------------------------------------------------------


def overrides(data: bytes) -> bool:
    """Words of a command line, a NUL after each. `--array ` begins a word of `slurm submit`, `@` a file's text."""
    words = [os.fsdecode(word) for word in data.split(b"\0")]
    if words[0].startswith("@"):
        return _array_file(data[1:])
    if words[0].startswith("--array "):
        return _array(words[0].removeprefix("--array "))
    try:
        options = parse(words)
    except UserError as error:
        return _refused(error)
    except SystemExit:
        assert any(word[:2] in ("-h", "--") for word in words), "it ended without a word"
        return True
    given = [word for word in words if word not in ("--", "--debug", "--print-config")]
    read = [options.config] * (options.config is not None) + options.overrides
    options_typed = [word for word in words if word.startswith("--")]
    assert options_typed or sorted(read) == sorted(given), "words are lost"
    return _loads([word for word in read if "=" in word])


def _loads(words: list[str]) -> bool:
    try:
        found = load("demo", words)
    except UserError as error:
        return _refused(error)
    with tempfile.TemporaryDirectory(prefix="muster-fuzz-") as folder:
        _same_again(found, Path(folder) / "config.yaml")
    for place, word in enumerate(words):
        key, _, written = word.partition("=")
        key = key.strip()
        later = [other.partition("=")[0].strip() for other in words[place + 1 :]]
        if not any(f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in later):
            assert _is_meant(key, written, _value(found, tuple(key.split(".")))), (word, "is another value afterwards")
    return True


def _is_meant(key: str, written: str, value: Any) -> bool:
    """Whether the value is the one that was typed."""
    bare = written.strip()
    quoted = len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\""
    if value is None:
        return bare in _NULLS
    if isinstance(value, str) and (not quoted or value == written):
        is_path = key in _PATHS or key.endswith(".path")
        return value == written or (is_path and value == os.path.expanduser(written))
    if isinstance(value, str):
        inner = yaml.load(bare, _AllText)
        return value in (inner, os.path.expanduser(inner) if key in _PATHS or key.endswith(".path") else inner)
    if isinstance(value, bool):
        return bare.lower() == str(value).lower()
    if isinstance(value, int):
        number = re.fullmatch("[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+", bare)
        return number is not None and value == (int(bare, 0) if bare[:2] in ("0x", "0o") else int(bare))
    if isinstance(value, float):
        return value == float(int(bare, 0) if bare[:2] in ("0x", "0o") else bare)
    return bare[:1] in ("[", "{")  # `config` checks the content of lists and sections


def _array(word: str) -> bool:
    """`--array KEY=[A,B]`: check that each item has the value that it has alone."""
    if "=" not in word:
        return False  # the name of a file
    try:
        runs = overrides_of([word])
    except UserError as error:
        return _refused(error)
    key, _, text = word.partition("=")
    rest = text
    for ((own, _),) in runs:
        assert own.startswith(f"{key}="), own
        before, item, rest = rest.partition(own[len(key) + 1 :])
        assert item or own == f"{key}=", "an item is not what was typed"
        assert not re.sub(r"#[^\n]*", "", before).strip("[, \t\r\n\x85\u2028\u2029\ufeff"), f"{before!r} is lost"
    return all([_labelled(runs), *(_loads(_typed(own)) for own in runs[:3])])


def _array_file(content: bytes) -> bool:
    """`--array FILE`: check that there is a run for each line that is neither blank nor a comment."""
    with tempfile.TemporaryDirectory(prefix="muster-fuzz-") as folder:
        path = Path(folder) / "runs"
        path.write_bytes(content)
        try:
            runs = overrides_of([str(path)])
        except UserError as error:
            return _refused(error)
    lines = re.split("\r\n|\n|\r", content.decode("utf-8-sig"))
    meant = [shlex.split(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert [_typed(own) for own in runs] == meant, "other runs than the file has lines"
    return all([_labelled(runs), *(_loads(_typed(own)) for own in runs[:3])])


def _typed(own: list[Override]) -> list[str]:
    return [override.typed for override in own]


def _labelled(runs: list[list[Override]]) -> bool:
    try:
        found = labels(runs)
    except UserError as error:
        return _refused(error)
    assert len(set(found)) == len(runs)
    assert all(len(os.fsencode(label)) <= 255 and "/" not in label and label not in (".", "..") for label in found)
    return True


# ---- environment -----------------------------------------------------------------------------------------------------

_NUMBERS = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MUSTER_PARENT", "MUSTER_PRETEND_GPUS"),
    *("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_NUM_NODES"),
    *("SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID"),
}
_USABLE = {
    **dict.fromkeys(_NUMBERS, lambda text: re.fullmatch("[0-9]{1,18}", text)),
    "MASTER_PORT": lambda text: re.fullmatch("[0-9]{1,18}", text) and 1 <= int(text) <= 65535,
    **dict.fromkeys(("MUSTER_LAUNCHED", "MUSTER_CLOCK"), lambda text: _is_time(text)),
    "SLURMD_NODENAME": lambda text: re.fullmatch("[A-Za-z0-9._-]{0,200}", text),
    **dict.fromkeys(
        ("MUSTER_STOP_REQUEST", "MUSTER_USER_ERROR", "MUSTER_FAILURES", "MUSTER_HEARTBEATS"),
        lambda text: text.startswith("/"),
    ),
    **dict.fromkeys(("MASTER_ADDR", "MUSTER_LEASE", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST"), str.strip),
    "OMP_NUM_THREADS": lambda text: _are_threads(text),
}


_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_LATER = (*_RANKS, "MASTER_ADDR", "MASTER_PORT")  # only workers read these


def _is_usable(name: str, text: str) -> bool:
    return name not in _USABLE or bool(_USABLE[name](text))


def _are_threads(text: str) -> bool:
    """Whether the text is a list of whole numbers, or empty, which counts as not set."""
    numbers = [re.fullmatch("[ \t]*([0-9]{1,18})[ \t]*", part) for part in text.split(",")]
    return not text.strip() or all(number and int(number[1]) for number in numbers)


def _is_time(text: str) -> bool:
    """Whether a clock can have shown this number of seconds."""
    return bool(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text)) and abs(float(text)) < 1e10


def environment(data: bytes) -> bool:
    """NAME=text, a NUL after each. A name in /proc or /sys is that of a file about the number of processors."""
    pairs = [os.fsdecode(word).partition("=") for word in data.split(b"\0")]
    environ = {name: text for name, equals, text in pairs if equals and name in env.VARIABLES}
    files = {name: text for name, equals, text in pairs if equals and name.startswith(("proc/", "sys/"))}
    _processors(files)
    with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": environ.get("CUDA_VISIBLE_DEVICES", "")}):
        assert 0 <= count_visible() <= len(named(os.environ["CUDA_VISIBLE_DEVICES"])[0])
    unusable = [name for name, text in environ.items() if name not in _LATER and not _is_usable(name, text)]
    refused: UserError | None = None
    try:
        env.check(environ)
    except UserError as error:
        refused = error
    assert bool(refused) == bool(unusable), f"not usable: {unusable}; {refused}"
    assert refused is None or str(refused).partition("=")[0] in unusable
    return _together(environ) if refused is None else _refused(refused)


def _together(environ: dict[str, str]) -> bool:
    env.Job.read(environ)
    try:
        ranks, launcher = env.Ranks.read(environ), env.FromLauncher.read(environ)
    except UserError as error:
        return _refused(error)
    for name in _LATER if ranks.size > 1 else _RANKS:
        assert name not in environ or _is_usable(name, environ[name]), f"{name} is not refused"
    read = (ranks.rank, ranks.size, ranks.local_rank, ranks.local_size)
    for name, number in zip(_RANKS, read, strict=True):
        assert name not in environ or int(environ[name]) == number, f"{name} is read as another"
    assert 0 <= ranks.rank < ranks.size
    assert 0 <= ranks.local_rank < ranks.local_size <= ranks.size
    if launcher is not None:
        again = env.FromLauncher.read(launcher.environment())
        assert again is not None
        assert math.isclose(again.clock, launcher.clock, abs_tol=1e-3), "told on, it is another clock"
    return True


def _processors(files: dict[str, str]) -> None:
    """Check that there is at least one processor, and none that this process may not use, however odd the files are."""
    if not files:
        return
    with tempfile.TemporaryDirectory(prefix="muster-fuzz-") as folder:
        for name, text in files.items():
            path = Path(folder) / name
            if ".." not in path.parts and len(name) < 200:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(os.fsencode(text))
                except OSError:  # a file, where another name needs a folder
                    continue
        with patch.object(cgroups, "ROOT", Path(folder)):
            assert 1 <= processors.allowed() <= len(os.sched_getaffinity(0))
            processors._times()
