"""Muster works in any folder: whatever files are there, our own packages and the libraries are imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.traps import fill
from trainer.host import shadow

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", ["", ":", "."])
@pytest.mark.parametrize("module", ["trainer", "launch", "slurm"])
def test_a_module_of_ours_runs_whatever_lies_beside_it(module: str, path: str, tmp_path: Path) -> None:
    fill(tmp_path, module)
    words = {
        "trainer": ["configs/mine.yaml", "--print-config"],
        "launch": ["run", "--help"],
        "slurm": ["logs", "--help"],
    }
    command = [sys.executable, "-m", module, *words[module]]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_started_keeps_the_folder_off_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path}:{ROOT}")
    found = [sys.executable, "-c", "import launch.run.agent, trainer, models, yaml; print(launch.run.agent.__file__)"]
    env = {**os.environ, **shadow.apart()}
    done = subprocess.run(found, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (f"{ROOT}/launch/run/agent.py\n", "")
    monkeypatch.delenv("PYTHONPATH")
    done = subprocess.run([*shadow.python(), *found[1:]], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (f"{ROOT}/launch/run/agent.py\n", "")


def test_in_our_own_folder_the_path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert shadow.apart() == {}
    assert shadow.python() == [sys.executable]


def test_libraries_that_lie_beside_ours_are_found_and_hide_nothing(tmp_path: Path) -> None:
    """An image with WORKDIR /app, after pip install --target /app."""
    for package in shadow.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "only_here.py").write_text("")
    (tmp_path / "colorsys.py").write_text("raise SystemExit('the wrong module ran')\n")
    code = "import sys; sys.path.insert(0, ''); from trainer.host.shadow import stand_apart; stand_apart(); "
    code += "import only_here, colorsys, trainer; print(trainer.__file__)"
    for env in ({}, {"PYTHONPATH": str(tmp_path)}):
        command = [sys.executable, "-S", "-c", code]  # -S: an editable install would find a missing module
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert (done.stdout, done.stderr) == (f"{tmp_path}/trainer/__init__.py\n", "")


def test_an_installed_package_that_wrote_over_ours_is_named(tmp_path: Path) -> None:
    for package in shadow.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package)
    (tmp_path / "configs/errors.py").unlink()
    (tmp_path / "configs/__init__.py").write_text("theirs = 1\n")
    # -S: an editable install would find a missing module.
    command, env = [sys.executable, "-S", "-P", "-m", "launch", "--help"], {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2
    assert f"{tmp_path}/configs is not Muster's alone" in done.stderr
    assert "environment of its own" in done.stderr
