"""The content of a checkpoint, read by the safetensors library and the json module, never by the code under test."""

from __future__ import annotations

import json
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class Stored:
    """Whole tensors by key, put together from the pieces of all files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())

    @property
    def parameters(self) -> set[str]:
        return {key for key, entry in self.manifest["tensors"].items() if entry["group"] != "optim"}

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        whole: dict[str, torch.Tensor] = {}
        filled: dict[str, int] = {}
        shapes = {
            key: self.manifest["partitions"][entry["partition"]]["shape"]
            for key, entry in self.manifest["tensors"].items()
        }
        for index, file in enumerate(self.manifest["files"]):
            source = file.get("source")
            folder = self.folder if source is None else Path(self.manifest["sources"][source]["path"])
            named = self._labels(index)
            with safe_open(folder / file["path"], "pt") as opened:
                labels = set(opened.keys())
                # A file in another checkpoint may hold more, even tensors that this checkpoint now holds itself.
                assert labels == named if source is None else labels >= named, file["path"]
                for label in named:
                    key, _, place = label.rpartition("@")
                    part = opened.get_tensor(label)
                    tensor = whole.setdefault(key, torch.empty(shapes[key], dtype=part.dtype))
                    assert tensor.dtype == part.dtype
                    if place.startswith("+"):
                        tensor.view(-1)[int(place[1:]) : int(place[1:]) + part.numel()] = part
                    else:
                        offsets = [int(n) for n in place.split(",")] if place else []
                        box = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))
                        tensor[box] = part
                    filled[key] = filled.get(key, 0) + part.numel()
        assert {key: prod(shape) for key, shape in shapes.items()} == filled
        return whole

    def _labels(self, index: int) -> set[str]:
        """The labels of the pieces that the manifest places in the file of this number."""
        return {
            f"{key}@{','.join(map(str, piece['offsets']))}" if "offsets" in piece else f"{key}@+{piece['start']}"
            for key, entry in self.manifest["tensors"].items()
            for piece in self.manifest["partitions"][entry["partition"]]["pieces"]
            if piece["file"] == index
        }

    def same(self, other: Stored, key: str) -> bool:
        """Whether bits, number format and shape are equal."""
        mine, theirs = self.tensors[key], other.tensors[key]
        return mine.dtype == theirs.dtype and mine.shape == theirs.shape and bits(mine) == bits(theirs)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
