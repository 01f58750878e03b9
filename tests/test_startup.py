"""What must be quick: help, the resolved config, and every mistake in a config do not import torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machine import takes_at_most

LIMIT_S = 0.35

COMMANDS = {
    "trainer --help": (["trainer", "--help"], 0),
    "trainer --print-config": (["trainer", "llama3-8b", "--print-config"], 0),
    "unknown key": (["trainer", "demo", "modle.dim=3"], 2),
    "wrong type": (["trainer", "demo", "train.steps=many"], 2),
    "missing file": (["trainer", "nothing.yaml"], 2),
    "wrong unit": (["trainer", "demo", "train.time_limit_s=2h"], 2),
    "launch --help": (["launch", "--help"], 0),
    "launch run --help": (["launch", "run", "--help"], 0),
    "slurm --help": (["slurm", "--help"], 0),
    "slurm cluster --help": (["slurm", "cluster", "--help"], 0),
    "slurm cluster status": (["slurm", "cluster", "status", "--dir", "/tmp/muster-no-cluster"], 1),
    "slurm status --help": (["slurm", "status", "--help"], 0),
    "slurm status": (["slurm", "status", "tests"], 2),
    "slurm logs": (["slurm", "logs", "tests"], 2),
    "slurm stop": (["slurm", "stop", "tests"], 2),
    "slurm submit --help": (["slurm", "submit", "--help"], 0),
    "slurm unknown key": (["slurm", "submit", "demo", "--nodes", "2", "modle.dim=3"], 2),
    "slurm mistake": (["slurm", "cluster", "up", "--nodes", "0", "--dir", "/tmp/muster-no-cluster"], 2),
    "muster --help": (["muster", "--help"], 0),
    "muster complete": (["muster", "complete", "run", "optim."], 0),
    "launch unknown key": (["launch", "run", "demo", "modle.dim=3"], 2),
}


GOLDEN = "tests/trainer/checkpoint/golden"
# These verbs compute with no tensor of a checkpoint, only with JSON, names and bytes.
CHECKPOINTS = {
    "list": (["launch", "checkpoint", "list", GOLDEN], 0),
    "show": (["launch", "checkpoint", "show", f"{GOLDEN}/step-00000500"], 0),
    "verify": (["launch", "checkpoint", "verify", f"{GOLDEN}/step-00000500"], 0),
    "prune": (["launch", "checkpoint", "prune", "{run}", "--last", "1", "--dry-run"], 0),
}
TIMED = ("trainer --help", "trainer --print-config", "unknown key")


def start(words: list[str]) -> tuple[int, list[str], set[str]]:
    """Exit code, lines of its stderr, and modules that it had imported when it ended."""
    command = [sys.executable, "-X", "importtime", "-m", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stderr.splitlines()
    modules = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    told = [line for line in lines if not line.startswith("import time:")]
    return done.returncode, told, modules


@pytest.mark.parametrize("name", COMMANDS | CHECKPOINTS)
def test_starts_without_torch(name: str, tmp_path: Path) -> None:
    words, code = (COMMANDS | CHECKPOINTS)[name]
    if name == "prune":
        shutil.copytree(GOLDEN, tmp_path / "run/checkpoints")
        words = [word.format(run=tmp_path / "run") for word in words]
    found, told, modules = start(words)
    assert found == code, told
    assert not any("Traceback" in line for line in told)
    assert (len(told) in (1, 2)) == (code == 2), told
    assert "configs.errors" in modules
    assert "torch" not in modules


@pytest.mark.parametrize("name", TIMED)
def test_starts_at_once(name: str) -> None:
    words, code = COMMANDS[name]
    found: list[int] = []
    takes_at_most(LIMIT_S, lambda: found.append(start(words)[0]), tries=5)
    assert set(found) == {code}
