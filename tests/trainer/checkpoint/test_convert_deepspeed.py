"""Folders that DeepSpeed wrote, read without DeepSpeed: from the installed version, and from one of 2023.

DeepSpeed's own accessors gathered the expected content on the ranks that wrote the folders (`deepspeed_folder.py`).
"""

from __future__ import annotations

import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_folder import FROZEN, STEPS, write
from torch import nn

from configs.errors import UserError
from launch.__main__ import main
from tests.distributed import tiny
from tests.matrix.checks import put_together
from tests.matrix.model import register
from tests.matrix.ranks import go
from tests.pool import Pool
from tests.stored import Stored, bits
from trainer.checkpoint.load.kinds import find_kind
from trainer.checkpoint.load.start_from import checkpoint_named

OLD = Path(__file__).parent / "deepspeed-0.10.0"  # stage-1, stage-2, stage-3: two ranks in bf16
STAGES = (1, 2, 3)

# (ranks, stage, dtype, further settings)
CASES: list[tuple[int, int, str, dict[str, Any]]] = [(2, stage, "bf16", {}) for stage in STAGES]
FURTHER: list[tuple[int, int, str, dict[str, Any]]] = [
    *((ranks, stage, "fp32", {}) for ranks in (1, 2, 3) for stage in STAGES),
    *((3, stage, "bf16", {}) for stage in STAGES),
    *((ranks, 1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}}) for ranks in (2, 3)),  # its own class
    (3, 2, "bf16", {"zero_optimization": {"round_robin_gradients": True}}),
    (2, 1, "fp32", {"zero_optimization": {"elastic_checkpoint": True}}),
    (2, 2, "bf16", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    (2, 3, "bf16", {"zero_optimization": {"offload_param": {"device": "cpu"}, "sub_group_size": 40}}),
]


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Pool]]:
    """Number of ranks -> a pool under plain DeepSpeed."""
    made: dict[int, Pool] = {}
    yield made
    for pool in made.values():
        pool.close()


@pytest.fixture(scope="module")
def trainers() -> Iterator[Pool]:
    """A pool under our trainer, which sets up its own process group."""
    pool = Pool(2)
    yield pool
    pool.close()


def convert(source: Path, target: Path, *words: str) -> Stored:
    assert main(["checkpoint", "convert", str(source), str(target), "--from", "deepspeed", *words]) == 0
    return Stored(target)


def check(stored: Stored, told: dict[str, torch.Tensor], frozen: set[str], count: int = STEPS) -> None:
    """Check that the checkpoint holds what the ranks held, with the same bits and number formats, and nothing else."""
    aliases, tensors, manifest = stored.manifest["aliases"], stored.tensors, stored.manifest
    assert told.keys() - aliases.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (tensor.dtype, bits(tensor)) == (told[name].dtype, bits(told[name])), name
    groups = {name: entry["group"] for name, entry in manifest["tensors"].items()}
    assert {name for name, group in groups.items() if group == "frozen"} == frozen
    trained = {name.removesuffix(".exp_avg") for name in tensors if name.endswith(".exp_avg")}
    assert manifest["step_counts"] == dict.fromkeys(trained, count)
    assert (manifest["step"], manifest["loop"]["step"]) == (STEPS, STEPS)


def name_of(case: tuple[int, int, str, dict[str, Any]]) -> str:
    ranks, stage, dtype, more = case
    words = [str(part) for values in more.values() for part in values]
    return "-".join([f"stage{stage}", str(ranks), dtype, *words])


@pytest.mark.parametrize(
    "case",
    [
        *[pytest.param(case, id=name_of(case)) for case in CASES],
        *[pytest.param(case, id=name_of(case), marks=pytest.mark.full) for case in FURTHER],
    ],
)
def test_what_is_written_today(
    case: tuple[int, int, str, dict[str, Any]], pools: dict[int, Pool], tmp_path: Path
) -> None:
    ranks, stage, dtype, more = case
    pool = pools.setdefault(ranks, Pool(ranks))
    pool.run(partial(write, more=more), str(tmp_path / "d"), stage, dtype)
    told = torch.load(tmp_path / "d/told.pt", weights_only=True)
    check(convert(tmp_path / "d", tmp_path / "m"), told, set(FROZEN))
    weights = convert(tmp_path / "d" / f"global_step{STEPS}", tmp_path / "w", "--take", "weights")
    assert weights.tensors.keys() == {name for name in told if ".exp_avg" not in name} - {"head.weight"}
    # DeepSpeed's own way to whole weights leaves out frozen ones at stage 1.
    if not more:
        theirs = pool.run(their_weights, str(tmp_path / "d"))[0]
        assert set(FROZEN) - theirs == (set(FROZEN) if stage == 1 else set())


def their_weights(folder: str) -> set[str]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return set(get_fp32_state_dict_from_zero_checkpoint(folder))


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_written_in_2023(stage: int, tmp_path: Path) -> None:
    told = torch.load(OLD / f"stage-{stage}/told.pt", weights_only=True)
    # It made an optimizer step of zeros before the first step, which torch's AdamW counts.
    check(convert(OLD / f"stage-{stage}", tmp_path / "m"), told, set(FROZEN), STEPS + 1)


def decoder() -> nn.Module:
    from configs.schema.model import DecoderSection
    from models import build_model

    register()
    made = build_model(DecoderSection.model_validate(tiny(Path("/nowhere"))["model"]))
    module = made.module
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            made.initialise(name, tensor, torch.Generator().manual_seed(len(name)))
    return module


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_goes_on_from_it(stage: int, pools: dict[int, Pool], trainers: Pool, tmp_path: Path) -> None:
    """All weights and optimizer state reach the ranks' memory bit for bit, and the run trains on."""
    pool, frozen = pools.setdefault(2, Pool(2)), ("blocks.0.*",)
    pool.run(write, str(tmp_path / "d"), stage, "bf16", decoder, frozen)
    stored = convert(tmp_path / "d", tmp_path / "m")
    more = {
        "start__from": str(stored.folder),
        "start__take": "everything",
        "run__accept_changes": ["data.content"],
        "train__steps": STEPS + 2,
        "freeze__frozen": list(frozen),
        "precision__compute": "bf16",
    }
    ranks = trainers.run(go, tiny(tmp_path, **more), True)
    assert not ranks[0].refused, ranks[0].refused
    whole, _, wrong = put_together([rank.loaded for rank in ranks])
    assert not wrong
    told = torch.load(tmp_path / "d/told.pt", weights_only=True)
    assert whole.keys() == told.keys()
    for name, tensor in whole.items():
        assert bits(tensor) == bits(told[name]), name
    assert all(count == STEPS for count in ranks[0].loaded.step_counts.values())
    ended, _, _ = put_together([rank.ended for rank in ranks])
    assert {name for name in whole if bits(ended[name]) == bits(whole[name])} >= {
        name for name in told if name.startswith("blocks.0.")
    }
    assert bits(ended["blocks.1.mlp.down.weight"]) != bits(whole["blocks.1.mlp.down.weight"])


# ---- what cannot be read --------------------------------------------------------------------------------------------


@pytest.fixture(params=STAGES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an old folder, for a test to damage."""
    shutil.copytree(OLD / f"stage-{request.param}", tmp_path / "d")
    return tmp_path / "d"


Capture = pytest.CaptureFixture[str]


def refused(folder: Path, capsys: Capture) -> str:
    """Check that the conversion is refused in one or two lines with exit code 2, and leaves nothing; returns them."""
    before = sorted(folder.parent.iterdir())
    capsys.readouterr()
    assert main(["checkpoint", "convert", str(folder), str(folder.parent / "m"), "--from", "deepspeed"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert len(told.splitlines()) <= 2, told
    assert sorted(folder.parent.iterdir()) == before
    return told


def files(folder: Path, pattern: str = "*.pt") -> list[Path]:
    return sorted((folder / f"global_step{STEPS}").glob(pattern))


def test_a_file_that_is_missing(folder: Path, capsys: Capture) -> None:
    for path in files(folder):
        path.rename(folder / "away")
        told = refused(folder, capsys)
        assert path.name.removeprefix("bf16_") in told
        if "rank_1" in path.name:
            assert f"{path.name} is missing; 2 ranks wrote this checkpoint" in told
        (folder / "away").rename(path)


def test_a_file_too_many(folder: Path, capsys: Capture) -> None:
    path = files(folder, "*rank_1*optim*")[0]
    shutil.copy(path, path.with_name(path.name.replace("rank_1", "rank_2")))
    assert "rank_2_mp_rank_00_optim_states.pt: 2 ranks wrote this checkpoint; it is of" in refused(folder, capsys)
    shutil.copy(path, path.with_name("fp16_" + path.name.removeprefix("bf16_")))
    assert "are of the same rank: of different runs" in refused(folder, capsys)


def test_a_model_that_was_cut_in_other_ways(folder: Path, capsys: Capture) -> None:
    for name, what in (
        ("mp_rank_01_model_states.pt", "tensor parallel"),
        ("layer_00-model_00-model_states.pt", "pipeline"),
        ("expp_rank_0_expert_1_mp_rank_00_optim_states.pt", "mixture of experts"),
    ):
        path = folder / f"global_step{STEPS}" / name
        path.touch()
        assert f"{name}: cut in another way as well ({what})" in refused(folder, capsys)
        path.unlink()


def test_latest(folder: Path, capsys: Capture) -> None:
    (folder / "latest").write_text("global_step4\n")
    assert "latest names global_step4, and there is no such folder" in refused(folder, capsys)
    (folder / "latest").write_text("../elsewhere")
    assert "'../elsewhere' is not the name of a folder" in refused(folder, capsys)
    (folder / "latest").unlink()
    assert "a folder without a checkpoint" in refused(folder, capsys)


def test_a_folder_named_as_a_checkpoint_of_ours(tmp_path: Path, capsys: Capture) -> None:
    """DeepSpeed's tag may be `step-500`, which would be the name of a damaged checkpoint of ours."""
    shutil.copytree(OLD / "stage-2", tmp_path / "d")
    for tag in ("step-500", f"step-{STEPS:08d}"):
        folder = next(path for path in (tmp_path / "d").iterdir() if path.is_dir())
        folder.rename(folder.with_name(tag))
        (tmp_path / "d/latest").write_text(tag)
        for source in ("d", f"d/{tag}"):
            assert find_kind(tmp_path / source) == ("deepspeed", tmp_path / "d" / tag)
        with pytest.raises(UserError, match="is a folder of DeepSpeed's\nmake a checkpoint of it"):
            checkpoint_named(tmp_path / "d")
        assert main(["checkpoint", "show", str(tmp_path / "d")]) == 2
        assert "d: not a Muster checkpoint; convert it first" in capsys.readouterr().err
    assert main(["checkpoint", "diff", str(tmp_path / "d"), str(OLD / "stage-2")]) == 0


def changed(path: Path, change: Callable[[Any], None]) -> None:
    """Load a file as DeepSpeed's users do, change it and save it again."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def test_another_stage_than_it_says(tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(OLD / "stage-1", tmp_path / "d")
    for path in files(OLD / "stage-2", "*optim*"):
        shutil.copy(path, tmp_path / "d" / f"global_step{STEPS}")
    assert "it says ZeRO 1, but the optimizer's files are of ZeRO 2" in refused(tmp_path / "d", capsys)


def test_files_of_different_runs(tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(OLD / "stage-1", tmp_path / "d")
    _, two = files(tmp_path / "d", "*optim*")
    shutil.copy(OLD / "stage-2" / f"global_step{STEPS}" / two.name, two)
    told = refused(tmp_path / "d", capsys)
    assert "of ZeRO 2 on 2 ranks, rank 0's of ZeRO 1 on 2 ranks: of different runs" in told


def test_another_model(folder: Path, capsys: Capture) -> None:
    """Shapes that need more elements than the ranks hold, or fewer."""
    for path in files(folder, "*model*"):
        changed(path, lambda root: root["param_shapes"][0].update({"out.weight": torch.Size([50, 7])}))
    assert "elements: of another model" in refused(folder, capsys)
    for path in files(folder, "*model*"):
        changed(path, lambda root: root["param_shapes"][0].pop("embed.weight"))
        changed(path, lambda root: root["param_shapes"][0].update({"out.weight": torch.Size([1])}))
    told = refused(folder, capsys)
    assert "of another model" in told or "was not saved" in told


def test_not_of_zero(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "d").mkdir()
    torch.save({"module": {"w": torch.ones(2)}}, tmp_path / "d/mp_rank_00_model_states.pt")
    assert "not of ZeRO 1, 2 or 3" in refused(tmp_path / "d", capsys)
    torch.save([1, 2], tmp_path / "d/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert "it holds a list, not what DeepSpeed writes" in refused(tmp_path / "d", capsys)
    torch.save({"optimizer_state_dict": {"zero_stage": 9}}, tmp_path / "d/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert "not what a rank writes under ZeRO" in refused(tmp_path / "d", capsys)


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_nothing_in_it_is_run(folder: Path, capsys: Capture) -> None:
    mark = folder.parent / "it-ran"
    for path in files(folder):
        before = path.read_bytes()
        changed(path, lambda root: root.update(extra=Hostile(mark)))
        told = refused(folder, capsys)
        assert f"{path}, data.pkl: refused, nothing of it was run: it wants posix.mkdir" in told
        torch.load(path, weights_only=False)  # so the test can fail
        mark.rmdir()
        path.write_bytes(before)


def test_every_damaged_master_and_state_is_noticed(folder: Path, capsys: Capture) -> None:
    """One flipped bit in each tensor that is read, also in padding between and after parameters."""
    for path in files(folder, "*optim*"):
        before = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            records = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        assert len(records) >= 6
        for record in records:
            lengths = struct.unpack_from("<HH", before, record.header_offset + 26)
            start = record.header_offset + 30 + sum(lengths)
            for place in (start, start + record.file_size - 1):
                content = bytearray(before)
                content[place] ^= 1
                path.write_bytes(content)
                assert "damaged: their checksum is wrong" in refused(folder, capsys), (path, record.filename, place)
        path.write_bytes(before)
