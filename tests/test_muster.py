"""The `muster` command in any folder, and what a shell offers at Tab."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.explain import field_at
from configs.presets import about, presets
from configs.reference import ROOT
from launch.verbs import main_of
from muster.command import VERBS, main
from muster.completion import _SCRIPTS, WORDS, _keys, offer
from tests.traps import fill

MUSTER = Path(sys.executable).with_name("muster")


@pytest.fixture(autouse=True)
def _as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.host.arguments._as_muster", False)


@pytest.mark.parametrize("path", ["", f"{os.pathsep}nowhere"])
def test_it_works_in_any_folder(path: str, tmp_path: Path) -> None:
    fill(tmp_path, "muster")
    command, env = [MUSTER, "train", "configs/mine.yaml", "--print-config"], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("run:\n")


def test_version_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    told = capsys.readouterr().out
    assert re.fullmatch(r"muster [\d.]+, torch [\d.]+\S*, Python [\d.]+\S*, in \S+\n", told)
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == presets()
    assert all(
        len(about(name).split()) > 3 and about(name) in line for name, line in zip(presets(), lines, strict=True)
    )


# ---- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "typed", "words", "files"),
    [
        ([], "s", ["status", "stop", "submit"], False),
        (["run"], "dem", ["demo", "demo-freeze"], True),
        (["run", "demo"], "dem", [], False),
        (["run"], "op", ["optim."], True),
        (["submit", "demo"], "optim.s", ["optim.schedule="], False),
        (["train", "demo"], "data.sources.", ["data.sources.0."], False),
        (["train", "demo"], "run.tensorboard=", ["run.tensorboard=false", "run.tensorboard=true"], False),
        (["run", "demo"], "task.na", ["task.name="], False),
        (["run", "demo"], "task.name=", ["task.name=classify", "task.name=lm", "task.name=regress"], False),
        (["run", "demo"], "model.norm=l", ["model.norm=layernorm"], False),
        (["run", "demo"], "parallel.engine=", ["parallel.engine=fsdp", "parallel.engine=zero"], False),
        (["run", "demo"], "data.sources.0.path=te", [], True),
        (["run"], "--np", ["--nproc"], False),
        (["submit", "demo"], "--dry", ["--dry-run"], False),
        (["checkpoint"], "ver", ["verify"], False),
        (["checkpoint", "list"], "--j", ["--json"], False),
        (["watch"], "", [], True),
        (["bake"], "", [], False),
    ],
)
def test_offers(before: list[str], typed: str, words: list[str], files: bool) -> None:
    assert offer(before, typed) == (words, files)


def test_words_of_a_verb_are_those_that_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, words in WORDS.items():
        with pytest.raises(SystemExit):
            main_of(VERBS[verb].main)(["--help"])
        told = capsys.readouterr().out
        assert [word for word in words if not re.search(rf"\b{word}\b", told)] == []
        assert main([verb, "bake"]) == 2
        assert set(re.findall(r"'([a-z]+)'", capsys.readouterr().err)) - {"bake"} == set(words)


def test_every_key_that_is_offered_is_one() -> None:
    keys = [key for key, _ in _keys()]
    assert len(keys) > 150
    for key in keys:
        assert field_at(key.split(".")) is not None, key


def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "text").mkdir()
    lines = [
        "muster subm",
        "muster run optim.na",
        "muster run m",
        "X=1 muster run optim.name=adamw data.sources.0.path=te",
    ]
    ask = "".join(
        f"COMP_LINE={line!r} COMP_POINT={len(line)}; _muster muster; echo ${{COMPREPLY[*]}}\n" for line in lines
    )
    script = f'eval "$(muster completion bash)"\n{ask}complete -p muster\n'
    env = {**os.environ, "PATH": f"{MUSTER.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "submit", "optim.name=", "model. monitor. mine.yaml", "text", "complete -F _muster muster"
    ]  # fmt: skip
    assert done.stderr == ""


def test_a_shell_is_answered_at_once_and_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "muster", "complete", "run", "optim."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "muster.completion" in modules
    assert modules.isdisjoint({"torch", "pydantic", "yaml", "rich", "numpy"})


def test_every_shell_gets_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    for shell, script in _SCRIPTS.items():
        assert main(["completion", shell]) == 0
        assert capsys.readouterr().out == script
