"""What must be quick: help, the resolved config, and every mistake in a config come without torch."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import pytest

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


@pytest.mark.alone
@pytest.mark.parametrize("name", COMMANDS)
def test_starts_at_once_and_without_torch(name: str) -> None:
    words, code = COMMANDS[name]
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=60, check=False)
        seconds.append(time.perf_counter() - began)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert (len(done.stderr.splitlines()) in (1, 2)) == (code == 2)
    assert statistics.median(seconds) <= LIMIT_S
    modules = _modules(words)
    assert "configs.errors" in modules
    assert "torch" not in modules


def _modules(words: list[str]) -> set[str]:
    """What the command had imported when it ended."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *words], capture_output=True, text=True, timeout=60, check=False
    )
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
