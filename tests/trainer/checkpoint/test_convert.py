"""Checkpoints converted from one kind to another, bit for bit. PyTorch's own readers read the other kinds."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import golden_state
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from configs.errors import UserError
from launch.checkpoint.convert import dcp as convert_dcp
from launch.checkpoint.convert import muster as convert_muster
from launch.checkpoint.convert import state as convert_state
from launch.checkpoint.convert.convert import convert, open_state
from launch.checkpoint.convert.state import Range, stream
from trainer.checkpoint.format.files import FileReader
from trainer.checkpoint.format.manifest import Manifest
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.load.checkpoint import Checkpoint
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore
from trainer.progress import Progress

pytestmark = pytest.mark.filterwarnings("ignore")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*raw)


def by_library(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a converted checkpoint, read by the safetensors library. All are whole, at offset 0."""
    found = {}
    for path in sorted(checkpoint.glob("*/*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                name, _, offsets = key.rpartition("@")
                assert set(offsets) <= {"0", ","}, key
                found[name] = file.get_tensor(key)
    return found


def told(manifest: Manifest) -> dict[str, Any]:
    """Everything in a manifest, except where the bytes are."""
    text = manifest.model_dump(mode="json")
    tensors = {key: (t.group, t.dtype, manifest.shape_of(key), t.trained_step) for key, t in manifest.tensors.items()}
    return {k: v for k, v in text.items() if k not in ("files", "partitions", "checksums", "tensors")} | {"t": tensors}


def cut_state(root: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of two ranks' pieces: rows, columns and flat ranges; tied, frozen, a buffer, different step counts.
    Its sizes do not divide, and it is several times as large as a part of the stream."""
    torch.manual_seed(0)
    full = {
        "embed.weight": torch.randn(331, 7),
        "blocks.0.w": torch.randn(3001, 1111),
        "blocks.0.w.exp_avg": torch.randn(3001, 1111),
        "blocks.0.w.exp_avg_sq": torch.randn(3001, 1111).abs(),
        "norm.weight": torch.randn(5).bfloat16(),
        "norm.weight.exp_avg": torch.randn(5),
        "norm.weight.exp_avg_sq": torch.rand(5),
        "base.w": torch.randn(9, 4).half(),
        "base.w.exp_avg": torch.randn(9, 4),
        "rope.table": torch.randn(2, 3, 4),
    }
    groups = {key: "optim" if key.rpartition(".")[2].startswith("exp") else "model" for key in full}
    groups["base.w"] = "frozen"
    state = RunState(
        position={"consumed_samples": 77},
        loop=Progress(9, 77, best_score=1.5).state(),
        config={"optim": {"lr": 0.5, "betas": [0.8, 0.9]}},
        fingerprint="f0",
        model={"dim": 7},
        layout={"engine": "fsdp", "shard": 2},
        data={"a": "b"},
        step_counts={"blocks.0.w": 9, "norm.weight": 4, "base.w": 2},
        aliases={"head.weight": "embed.weight"},
        trained_steps={"base.w": 3},
    )
    stores = [
        CheckpointStore(root, rank, 2, kv, asynchronous=True)
        for kv in [torch.distributed.HashStore()]
        for rank in (0, 1)
    ]
    for rank, store in enumerate(stores):
        pieces = []
        for key, tensor in full.items():
            shape, half = tuple(tensor.shape), tensor.numel() // 2
            if key == "blocks.0.w.exp_avg":
                low, high = ((0, 500), (500, 1111))[rank]
                pieces.append(Piece(key, groups[key], tensor[:, low:high], shape, (0, low), (3001, high - low)))
            elif key == "blocks.0.w.exp_avg_sq":
                flat = tensor.view(-1)[:half] if rank == 0 else tensor.view(-1)[half:]
                pieces.append(Piece(key, groups[key], flat, shape, (), (), start=rank * half))
            else:
                low, high = ((0, shape[0] // 2), (shape[0] // 2, shape[0]))[rank]
                at, sizes = (low, *[0] * (len(shape) - 1)), (high - low, *shape[1:])
                pieces.append(Piece(key, groups[key], tensor[low:high], shape, at, sizes))
        store.save(9, pieces, state, metric=1.5)
    assert [result.error for store in stores for result in store.wait()] == [None, None]
    return root / "step-00000009", full


@pytest.mark.parametrize("through", ["torch", "dcp"])
def test_there_and_back(tmp_path: Path, through: Any) -> None:
    """Everything survives both ways: bits, groups, step counts, ties, position, config."""
    source, full = cut_state(tmp_path / "checkpoints")
    convert(source, tmp_path / "between", through)
    convert(tmp_path / "between", tmp_path / "back", "muster")
    checkpoint = Checkpoint(tmp_path / "back")
    checkpoint.verify()
    found = by_library(tmp_path / "back")
    assert found.keys() == full.keys()
    assert [key for key in full if not same_bits(found[key], full[key])] == []
    assert told(checkpoint.manifest) == told(Checkpoint(source).manifest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "between", "checkpoints"]


@pytest.mark.parametrize("through", ["torch", "dcp"])
def test_every_dtype_there_and_back(tmp_path: Path, through: Any) -> None:
    convert(golden_state.FOLDER, tmp_path / "between", through)
    convert(tmp_path / "between", tmp_path / "back", "muster")
    full = golden_state.tensors()
    found = by_library(tmp_path / "back")
    assert found.keys() == {key for key, tensor in full.items() if tensor.numel()}
    assert [key for key in found if not same_bits(found[key], full[key])] == []
    assert told(Checkpoint(tmp_path / "back").manifest) == told(Checkpoint(golden_state.FOLDER).manifest)


def test_into_a_file_that_torch_loads(tmp_path: Path) -> None:
    source, full = cut_state(tmp_path / "checkpoints")
    target = tmp_path / "model.pt"
    convert(source, target, "torch")
    assert zipfile.ZipFile(target).testzip() is None
    for loaded in (torch.load(target, weights_only=True), torch.load(target, weights_only=True, mmap=True)):
        model, optim = loaded["model"], loaded["optim"]
        names = {key for key in full if ".exp_avg" not in key}
        assert model.keys() == names | {"head.weight"}
        assert all(same_bits(model[key], full[key]) for key in names)
        assert model["head.weight"].data_ptr() == model["embed.weight"].data_ptr()  # still tied
        assert {n: s["step"].item() for n, s in optim["state"].items()} == {
            "blocks.0.w": 9,
            "norm.weight": 4,
            "base.w": 2,
        }
        states = {f"{n}.{k}": t for n, s in optim["state"].items() for k, t in s.items() if k != "step"}
        assert states.keys() == full.keys() - names
        assert all(same_bits(states[key], full[key]) for key in states)
        assert loaded["step"] == 9
        assert json.loads(loaded["muster"])["facts"]["position"] == {"consumed_samples": 77}


class Net(nn.Module):
    """A net with tied weights, odd sizes and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 13)
        self.outer = nn.Linear(13, 7, bias=False)
        self.register_buffer("scale", torch.tensor([1.5, 2.5, 3.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x).tanh()) * self.scale[0]


def trained(steps: int = 3) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.95))
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(14.0).reshape(2, 7) / 10).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of_net(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state by Muster's names, from torch's own objects."""
    found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}.{key}"] = value.clone()
    return found


def test_into_a_folder_that_dcp_loads_into_a_model(tmp_path: Path) -> None:
    """The recipe of PyTorch's tutorials: get_state_dict, dcp.load, set_state_dict. Then the next step is the same."""
    model, optimizer = trained()
    parts = get_state_dict(model, optimizer)
    torch.save({"model": parts[0], "optim": parts[1], "step": 3}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "m", "muster")
    convert(tmp_path / "m", tmp_path / "d", "dcp")
    other = Net()
    its = torch.optim.AdamW(other.parameters(), lr=9.0)
    weights, states = get_state_dict(other, its)
    wanted = {"model": weights, "optim": states, "step": 0}
    dcp.load(wanted, checkpoint_id=tmp_path / "d", no_dist=True)
    set_state_dict(other, its, model_state_dict=weights, optim_state_dict=wanted["optim"])
    assert wanted["step"] == 3
    assert its.param_groups[0]["lr"] == 0.1
    for net, opt in ((model, optimizer), (other, its)):
        step(net, opt)
    expected, found = state_of_net(model, optimizer), state_of_net(other, its)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not same_bits(expected[key], found[key])] == []


def test_from_a_dcp_folder_of_one_process(tmp_path: Path) -> None:
    model, optimizer = trained()
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": states, "train": {"step": 3}}, checkpoint_id=tmp_path / "d", no_dist=True)
    done = convert(tmp_path / "d", tmp_path / "m", "muster")
    assert done.left_out == []
    check_net(tmp_path / "m", state_of_net(model, optimizer), 3)
    manifest = Checkpoint(tmp_path / "m").manifest
    assert (manifest.step, manifest.loop) == (3, {"step": 3})
    assert manifest.config["converted_from"]["values"]["optim.param_groups.0.lr"] == 0.1


def check_net(folder: Path, expected: dict[str, torch.Tensor], updates: int) -> None:
    """Check that a converted checkpoint of the net holds exactly its state."""
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    found = by_library(folder)
    tensors = {key: tensor for key, tensor in expected.items() if not key.endswith(".step")}
    assert found.keys() == tensors.keys()
    assert [key for key in tensors if not same_bits(found[key], tensors[key])] == []
    counts = {key.removesuffix(".step"): int(n) for key, n in expected.items() if key.endswith(".step")}
    assert checkpoint.manifest.step_counts == counts
    assert set(counts.values()) == {updates}


def test_a_flat_dict_keeps_its_names(tmp_path: Path) -> None:
    """Names that begin with "model." stay unchanged where nothing shows that the word is not part of them."""
    tensors = {"model.layers.0.w": torch.randn(3, 4), "lm_head.weight": torch.randn(2)}
    torch.save(tensors, tmp_path / "a.pt")
    dcp.save(dict(tensors), checkpoint_id=tmp_path / "d", no_dist=True)
    for source in ("a.pt", "d"):
        convert(tmp_path / source, tmp_path / f"m-{source}", "muster")
        found = by_library(tmp_path / f"m-{source}")
        assert found.keys() == tensors.keys()
        assert all(same_bits(found[key], tensors[key]) for key in tensors)


def test_strided_tied_and_shared_tensors_of_torch_save(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(5, 12)
    tensors = {
        "turned": base.t(),
        "columns": base[:, 3:7],
        "row": base[2],
        "spread": torch.ones(1).expand(4),
        "first": base,
        "second": base,
        "parameter": nn.Parameter(torch.randn(3)),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(3),
    }
    torch.save({"state_dict": tensors, "epoch": 7}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "m", "muster")
    checkpoint = Checkpoint(tmp_path / "m")
    assert checkpoint.manifest.aliases == {"second": "first"}
    for key, tensor in tensors.items():
        assert same_bits(checkpoint.read(key).reshape(tensor.shape), tensor.detach()), key
    assert checkpoint.manifest.config["converted_from"]["values"] == {"epoch": 7}


def test_optimizer_state_by_number(tmp_path: Path) -> None:
    """With names beside the numbers the state is converted. Without them it is refused, but the weights are not."""
    model, _ = trained(0)
    optimizer = torch.optim.AdamW(model.named_parameters())
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "named.pt")
    convert(tmp_path / "named.pt", tmp_path / "m", "muster")
    check_net(tmp_path / "m", state_of_net(model, optimizer), 1)
    groups = optimizer.state_dict()
    del groups["param_groups"][0]["param_names"]
    torch.save({"model": model.state_dict(), "optimizer": groups}, tmp_path / "numbered.pt")
    with pytest.raises(UserError, match="--take weights"):
        convert(tmp_path / "numbered.pt", tmp_path / "n", "muster")
    convert(tmp_path / "numbered.pt", tmp_path / "n", "muster", weights_only=True)
    assert by_library(tmp_path / "n").keys() == model.state_dict().keys()


def test_small_bounds_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, chunks and parts far smaller than a tensor, as with a state of terabytes."""
    source, full = cut_state(tmp_path / "checkpoints")
    monkeypatch.setattr(convert_dcp, "FILE_LIMIT_BYTES", 1 << 20)
    monkeypatch.setattr(convert_dcp, "CHUNK_LIMIT_BYTES", 1 << 20)
    monkeypatch.setattr(convert_muster, "FILE_LIMIT_BYTES", 1 << 20)
    monkeypatch.setattr(convert_state, "PART_BYTES", 1 << 18)
    convert(source, tmp_path / "d", "dcp")
    assert len(list((tmp_path / "d").glob("*.distcp"))) > 10
    loaded = {"model": {"blocks.0.w": torch.empty(3001, 1111)}}
    dcp.load(loaded, checkpoint_id=tmp_path / "d", no_dist=True)
    assert same_bits(loaded["model"]["blocks.0.w"], full["blocks.0.w"])
    convert(tmp_path / "d", tmp_path / "m", "muster")
    assert len(list((tmp_path / "m").glob("*/*.safetensors"))) >= 6
    found = by_library(tmp_path / "m")
    assert [key for key in full if not same_bits(found[key], full[key])] == []


def test_a_run_folder_is_its_newest_checkpoint(tmp_path: Path) -> None:
    source, _ = cut_state(tmp_path / "checkpoints")
    shutil.copytree(source, source.with_name("step-00000003"))
    assert open_state(tmp_path).path == source
    assert open_state(tmp_path / "checkpoints").path == source


def test_a_stream_is_read_ahead_but_never_mixed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_state, "PART_BYTES", 64)
    source, full = cut_state(tmp_path / "checkpoints")
    tensors = open_state(source).tensors
    wanted = [Range(tensors["embed.weight"].content, 5, 100), Range.whole(tensors["norm.weight"].content)]
    seen: list[int] = []
    with stream(wanted, seen.append) as parts:
        content = b"".join(map(bytes, parts))
    expected = [full["embed.weight"].view(-1)[5:105], full["norm.weight"]]
    assert content == b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in expected)
    assert sum(seen) == len(content)


def test_no_block_of_a_checkpoint_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts end where blocks end, so that checking whole blocks costs nothing extra."""
    full = torch.randn(5_000_000)
    store = CheckpointStore(tmp_path / "checkpoints", asynchronous=False)
    store.save(1, [Piece("w", "model", full, (5_000_000,), (0,), (5_000_000,))], RunState())
    assert [result.error for result in store.poll()] == [None]
    read: list[int] = []
    plain = FileReader.read_block

    def counted(self: FileReader, index: int, parts: Any) -> None:
        read.append(index)
        plain(self, index, parts)

    monkeypatch.setattr(FileReader, "read_block", counted)
    convert(store.shelf.path(1), tmp_path / "a.pt", "torch")
    assert sorted(read) == list(range(5))
    assert same_bits(torch.load(tmp_path / "a.pt", weights_only=True)["model"]["w"], full)
