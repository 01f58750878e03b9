"""The golden checkpoint of format 1: every later version must read it, and so must any reader of safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import golden_state
import torch
from golden_state import FOLDER, STEP, tensors
from safetensors import safe_open

from trainer.checkpoint.load.checkpoint import Checkpoint


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_it_reads() -> None:
    checkpoint = Checkpoint(FOLDER)
    checkpoint.verify()
    manifest = checkpoint.manifest
    assert manifest.tensors.keys() == tensors().keys()
    for key, tensor in tensors().items():
        assert same_bits(checkpoint.read(key), tensor), key
    state = golden_state.state()
    for name in ("position", "loop", "config", "fingerprint", "model", "layout", "data", "step_counts", "aliases"):
        assert getattr(manifest, name) == getattr(state, name)
    assert (manifest.step, manifest.attempt, manifest.metric) == (STEP, 2, 2.5)
    assert manifest.tensors["embed.weight"].trained_step == 300
    assert manifest.tensors["scale"].trained_step == STEP
    assert same_bits(checkpoint.read("head.weight"), tensors()["embed.weight"])


def with_the_library(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors put together by the safetensors library, from the file names and keys alone."""
    found: dict[str, torch.Tensor] = {}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors().items()}
    for file in sorted(folder.glob("*/*.safetensors")):
        with safe_open(file, "pt") as opened:
            for label in opened.keys():  # noqa: SIM118 - it is no dict
                key, _, place = label.rpartition("@")
                part = opened.get_tensor(label)
                whole = found.setdefault(key, torch.zeros(shapes[key], dtype=part.dtype))
                if place.startswith("+"):
                    whole.view(-1)[int(place) : int(place) + part.numel()] = part
                else:
                    offsets = [int(offset) for offset in place.split(",") if offset]
                    whole[tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))] = part
    return found


def test_the_safetensors_library_reads_the_same() -> None:
    found = with_the_library(FOLDER)
    expected = {key: tensor for key, tensor in tensors().items() if tensor.numel()}
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert same_bits(found[key], tensor), key


def test_what_is_written_today_is_the_same_bytes(tmp_path: Path) -> None:
    """Format 1 does not change: only the time of saving may differ."""
    golden_state.make(tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / FOLDER.name
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*") if path.is_file())
    for path in files:
        if path.name != "manifest.json":
            assert (folder / path).read_bytes() == (FOLDER / path).read_bytes(), path
    old, new = (json.loads((where / "manifest.json").read_bytes()) for where in (FOLDER, folder))
    for manifest in (old, new):
        del manifest["saved_s"], manifest["digest"]
    assert old == new
