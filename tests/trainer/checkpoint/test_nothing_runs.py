"""A hostile pickle, in every place that some loader would open, runs nothing here: it is refused or left alone.

The pickle would create a file. Each command that opens the folder runs in a new process, as a person would run it.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_faults import whole

from configs.config import Config
from configs.errors import UserError
from configs.schema.checkpoint import KeepSection
from tests.distributed import run_ranks, tiny, train
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore
from trainer.life.stop import StopWish
from trainer.start import start

ROOT = Path(__file__).resolve().parents[3]
NAMES = (
    *("manifest.json", "checksums.json", ".metadata", "__0_0.distcp", "pytorch_model.bin", "optimizer.pt", "latest"),
    *("rng_state.pth", "trainer_state", "training_args.bin", "scheduler.pt", "mp_rank_00_model_states.pt", "x.pkl"),
    *("global_step2/mp_rank_00_model_states.pt", "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    *("model/rank-00000.safetensors", "model.safetensors", "optim/x.distcp", "zero_to_fp32.py", "__init__.py"),
)


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.proof),)


def kinds(proof: Path) -> dict[str, bytes]:
    """The pickle in several forms: alone in two protocols, in an archive of torch.save, and as a program."""
    content = pickle.dumps(Hostile(proof))
    return {
        "pickle": content,
        "old pickle": pickle.dumps(Hostile(proof), protocol=0),
        "archive": archive(content, proof),
        "program": f"import os\nos.mkdir({str(proof)!r})\n".encode(),
    }


def archive(content: bytes, proof: Path) -> bytes:
    path = proof.with_name("archive")
    torch.save({"a": torch.zeros(3)}, path)
    changed = proof.with_name("changed")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            new.writestr(info, content if info.filename.endswith("data.pkl") else old.read(info))
    return changed.read_bytes()


def test_the_pickles_are_hostile(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for name, content in kinds(proof).items():
        if name.endswith("pickle"):
            pickle.loads(content)
        elif name == "archive":
            (tmp_path / "a").write_bytes(content)
            torch.load(tmp_path / "a", weights_only=False)
        else:
            exec(content, {})
        proof.rmdir()


def strew(folder: Path, content: bytes) -> None:
    """Write the content in every place, over whatever was there."""
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def save(root: Path, step: int) -> Path:
    root.parent.mkdir(parents=True, exist_ok=True)
    store = CheckpointStore(root, attempt=step, keep=KeepSection(last=9), asynchronous=False, say=lambda line: None)
    pieces = [whole("a", "model", torch.full((40,), float(step))), whole("a.m", "optim", torch.zeros(40))]
    store.save(step, pieces, RunState(step_counts={"a": step}))
    assert store.wait()[0].ok
    return store.shelf.path(step)


VERBS: dict[str, list[str]] = {
    "list": ["list", "{run}"],
    "show": ["show", "{ckpt}"],
    "verify": ["verify", "{run}"],
    "diff": ["diff", "{ckpt}", "{good}"],
    "prune": ["prune", "{run}", "--last", "1", "--dry-run"],
    "convert": ["convert", "{ckpt}", "{out}", "--to", "muster"],
    "convert to torch": ["convert", "{run}", "{out}", "--to", "torch"],
    "convert a DCP folder": ["convert", "{dcp}", "{out}", "--to", "muster"],
    "convert an archive": ["convert", "{ckpt}/pytorch_model.bin", "{out}", "--to", "muster"],
    "show an archive": ["diff", "{ckpt}/optimizer.pt", "{good}"],
}


def in_one_process(calls: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and output of each call of `launch`. One child process makes all calls, one after the other."""
    program = (
        "import contextlib, io, json, sys\n"
        "from launch.__main__ import main\n"
        "found = []\n"
        "for call in json.loads(sys.stdin.read()):\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):\n"
        "        try:\n"
        "            code = main(call)\n"
        "        except SystemExit as left:\n"
        "            code = left.code\n"
        "    found.append((code, out.getvalue()))\n"
        "print(json.dumps(found))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[tuple[int, str]] = json.loads(done.stdout)
    return found


def test_no_verb_runs_anything(tmp_path: Path) -> None:
    calls: list[list[str]] = []
    every = kinds(tmp_path / "proof")
    for kind, content in every.items():
        folder = tmp_path / f"in {kind}"
        good = save(folder / "good/checkpoints", 1)
        for step in (1, 2, 3):
            save(folder / "run/checkpoints", step)
        bad, dcp = folder / "run/checkpoints/step-00000003", folder / "dcp"
        strew(bad, content)
        strew(folder / "run", content)
        (folder / "run/manifest.json").unlink()  # else the folder would itself be a checkpoint
        strew(dcp, content)
        (dcp / "manifest.json").unlink()
        names = {"run": folder / "run", "ckpt": bad, "good": good, "dcp": dcp}
        for verb, words in VERBS.items():
            calls.append(["checkpoint", *(word.format(**names, out=folder / f"out {verb}") for word in words)])
    answers = in_one_process(calls)
    for (kind, verb), (code, said) in zip(itertools.product(every, VERBS), answers, strict=True):
        assert not (tmp_path / "proof").exists(), (kind, verb, said)
        assert "Traceback" not in said, (kind, verb, said)
        if verb not in ("list", "prune"):
            assert code in (1, 2), (kind, verb, code, said)
            complaint = [line for line in said.splitlines() if line.strip()]
            assert 1 <= len(complaint) <= (6 if verb == "verify" else 3), (kind, verb, said)
        assert not list((tmp_path / f"in {kind}").glob("out*"))


def start_with(configs: list[dict[str, Any]]) -> list[str]:
    """On a rank: the result of each start."""
    found = []
    for config in configs:
        try:
            found.append(str(start(Config.model_validate(config), StopWish())))
        except UserError as error:
            found.append(f"refused: {error}")
    return found


@pytest.mark.parametrize("kind", ["pickle", "archive"])
def test_no_start_runs_anything(tmp_path: Path, kind: str) -> None:
    """A named folder or file of this kind is refused. A run that continues falls back, and leaves unknown entries
    alone."""
    proof = tmp_path / "proof"
    content = kinds(proof)[kind]
    config = tiny(tmp_path, train__steps=2, checkpoint__every_steps=1)
    assert train(config) == [0]
    newest, extra, only = tmp_path / "run/checkpoints/step-00000002", tmp_path / "extra", tmp_path / "only"
    shutil.copytree(newest, extra)
    ours = {name: (extra / name).read_bytes() for name in NAMES if (extra / name).exists()}
    for folder in (extra, newest, only):
        strew(folder, content)
    for name, sound in ours.items():
        (extra / name).write_bytes(sound)
    (only / "manifest.json").unlink()
    named = [newest, only, only / "pytorch_model.bin", only / "model.safetensors", only / "nothing", extra]
    change = {"run": {**config["run"], "dir": str(tmp_path / "new")}, "train": {**config["train"], "steps": 1}}
    on = {**config, "train": {**config["train"], "steps": 3}}
    starts = [{**config, **change, "start": {"from": str(name)}} for name in named]
    *refusals, good, continued = run_ranks(1, start_with, [*starts, on])[0]
    assert not proof.exists()
    for name, refusal in zip(named, refusals, strict=False):
        assert refusal.startswith("refused: start.from:"), (name, refusal)
        assert refusal.count("\n") <= 1, refusal
        assert str(name) in refusal, refusal
    assert (good, continued) == ("0", "0")
    assert (tmp_path / "run/checkpoints/step-00000002.bad-0").is_dir()
