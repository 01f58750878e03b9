"""NVMe offload under ZeRO-3: between steps, DeepSpeed's files hold masters, their state and parameters, and no result
changes. Tests marked `full` (`make matrix-zero`) fail where DeepSpeed's extension async_io does not build.

The models are large enough that some tensors swap, which takes 1 MiB on each rank, and small enough that others do not.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.config import Config
from configs.errors import UserError
from tests.distributed import run_ranks, tiny
from tests.life.test_life_steps import on_ranks, poison
from tests.matrix import cells, harness
from tests.matrix.cells import Cell
from tests.matrix.harness import Matrix
from tests.matrix.ranks import Told, go
from tests.pool import Pool
from tests.stored import Stored
from trainer.engines.zero import swapped
from trainer.engines.zero.swapped import Mappings, Swapping, _building, _check_extension
from trainer.life.folder import RunFolder
from trainer.life.rows import read_rows
from trainer.ranks.world import World

BUILD_TIME_S = 600.0  # of the extension, at its first start on a machine; 210 s here
pytestmark = pytest.mark.timeout(BUILD_TIME_S + 300)
MODEL = {"vocab_size": 260, "dim": 256, "layers": 2, "heads": 4, "mlp_dim": 2048, "max_seq_len": 64}
FROZEN = {"frozen": ["embed.*", "blocks.0.*"]}
PIPELINED = {"pipeline_read": True, "pipeline_write": True}


def nvme(folder: Path, parameters: bool = True, **optimizer: Any) -> dict[str, Any]:
    """Changes of a config under which every tensor that is large enough swaps, in several groups."""
    folder.mkdir(parents=True, exist_ok=True)
    place = {"device": "nvme", "nvme_path": str(folder)}
    zero = {"sub_group_size": 600_000, "offload_optimizer": {**place, **optimizer}}
    if parameters:
        zero["offload_param"] = {**place, "max_in_cpu": 0}
    return {"parallel__engine": "zero", "parallel__zero_stage": 3, "parallel__deepspeed": {"zero_optimization": zero}}


def config_of(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    every = {"run__dir": str(root / name), "optim__schedule": "constant", **changes}
    return tiny(root, **every) | {"model": MODEL}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(2)
    yield made
    made.close()


# ---- what cannot be -------------------------------------------------------------------------------------------------

NVME = {"device": "nvme", "nvme_path": "/tmp"}


@pytest.mark.parametrize(
    ("stage", "offload", "words"),
    [
        (2, {"offload_optimizer": NVME}, "offload_optimizer.device nvme needs parallel.zero_stage 3"),
        (3, {"offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device nvme needs nvme_path beside it"),
        (3, {"offload_optimizer": {**NVME, "device": "cpu"}}, "nvme_path needs device: nvme beside it"),
        (3, {"offload_param": NVME}, "offload_param.device nvme needs offload_optimizer.device nvme as well"),
        (3, {"offload_optimizer": {**NVME, "fast_init": True}}, "fast_init True contradicts how masters begin"),
        (3, {"offload_optimizer": {"device": "nvme", "nvme_path": "auto"}}, "nvme needs nvme_path beside it"),
        (
            3,
            {"offload_optimizer": NVME, "offload_param": NVME, "zero_hpz_partition_size": 2},
            "zero_hpz_partition_size and zero_optimization.offload_param.device nvme exclude each other",
        ),
        (
            3,
            {"offload_optimizer": NVME, "offload_param": NVME, "stage3_prefetch_bucket_size": 1000},
            "stage3_prefetch_bucket_size 1000 contradicts offload_param.device nvme",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(
    stage: int, offload: dict[str, Any], words: str, tmp_path: Path
) -> None:
    zero = {"parallel__engine": "zero", "parallel__zero_stage": stage}
    config = tiny(tmp_path, **zero, parallel__deepspeed={"zero_optimization": offload})
    with pytest.raises(ValueError, match=words):
        Config.model_validate(config)


def without_libaio(config: dict[str, Any]) -> Told:
    """One attempt on a machine where the extension does not build."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder.is_compatible = lambda self, verbose=False: False
    return go(config, False)


def test_where_it_cannot_be_nothing_is_touched(pool: Pool, tmp_path: Path) -> None:
    """One clear line on all ranks: no such folder, or no libaio."""
    config = config_of(tmp_path, "run", **nvme(tmp_path / "swap"))
    (tmp_path / "swap").rmdir()
    told = pool.run(go, config, False)
    assert {t.refused for t in told} == {
        f"parallel.deepspeed: nvme_path {tmp_path}/swap is no folder here: make it on every node, on a local disk"
    }
    (tmp_path / "swap").mkdir()
    for t in pool.run(without_libaio, config):
        assert t.refused is not None
        assert t.refused.startswith("device nvme needs DeepSpeed's extension async_io, which")
        assert t.refused.endswith(
            "install libaio's headers (apt: libaio-dev), a C++ compiler and ninja, or use device: cpu"
        )
    assert not (tmp_path / "run/config.yaml").exists()
    assert not list((tmp_path / "swap").iterdir())
    pool.close()  # these ranks have no libaio


# ---- folders and files ----------------------------------------------------------------------------------------------


def build_and_be_killed(folder: str) -> None:
    with _building([Path(folder)]):
        (Path(folder) / "lock").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_build_that_was_killed_holds_up_no_later_one(tmp_path: Path) -> None:
    folder = tmp_path / "async_io"
    folder.mkdir()
    with pytest.raises(AssertionError, match="died"):
        run_ranks(1, build_and_be_killed, str(folder))
    assert (folder / "lock").exists()
    with _building([folder]):
        assert not (folder / "lock").exists()
        (folder / "lock").touch()
    with _building([folder]):
        assert (folder / "lock").exists()  # another process's, which may be using the folder


def test_a_disk_that_is_too_small_is_refused_before_it_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"device": "nvme", "nvme_path": str(tmp_path)}
    swapping = Swapping({"zero_optimization": {"offload_optimizer": dict(place), "offload_param": dict(place)}})
    alone = World(0, 1, "here", torch.device("cpu"), None)
    monkeypatch.setattr(swapped.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    swapping.check_space(alone, (8_000, 2_000))
    with pytest.raises(UserError, match=r"has 9.8 KiB free, but 9.8 KiB will lie there, 1 bytes more: free some space"):
        swapping.check_space(alone, (8_000, 2_001))


def test_buffers_that_are_too_small_are_refused(tmp_path: Path) -> None:
    place = {"device": "nvme", "nvme_path": str(tmp_path)}
    parameters = {**place, "buffer_size": 99}
    swapping = Swapping({"zero_optimization": {"offload_optimizer": dict(place), "offload_param": parameters}})
    with pytest.raises(UserError, match=r"offload_param.buffer_size 99 is too little here: 100, or leave it out"):
        swapping.set_buffers(World(0, 1, "here", torch.device("cpu"), None), 100, 9)


def test_a_file_that_a_full_disk_cut_short_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "some.swp").write_bytes(bytes(100))
    with pytest.raises(RuntimeError, match="100 bytes instead of 400; disk full"):
        Mappings().tensor(tmp_path / "some.swp", torch.float32, 100)


def test_a_mapping_is_the_file(tmp_path: Path) -> None:
    files, path = Mappings(), tmp_path / "some.swp"
    files.zeros(path, torch.bfloat16, 1000, 4096)[:] = 1.5
    files.close()
    assert path.stat().st_size == 4096
    path.write_bytes(path.read_bytes()[:2] + b"\0\0" + path.read_bytes()[4:])
    assert files.tensor(path, torch.bfloat16, 1000).tolist() == [1.5, 0.0] + [1.5] * 998
    assert not files.zeros(path, torch.float32, 1000, 4096).any()


# ---- training -------------------------------------------------------------------------------------------------------


def build() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    _check_extension()


@pytest.fixture(scope="module")
def extension() -> None:
    """Build the extension, or fail the test: a claim about NVMe must be tested."""
    run_ranks(1, build, timeout_s=BUILD_TIME_S)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all": ({"train__micro_batch": 2}, {}),
    "optimizer": ({}, {"parameters": False}),
    "pipelined": ({}, PIPELINED),
    "frozen": ({"freeze": FROZEN}, {}),
    "bf16": ({"precision__compute": "bf16", "train__micro_batch": 1, "freeze": FROZEN}, {}),
    "sgd": ({"optim__name": "sgd", "optim__lr": 0.1, "parallel__activation_checkpoint": "full"}, {}),
    "leaves": ({"parallel__activation_checkpoint": "selective"}, {}),
}


@pytest.mark.full
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_in_host_memory_bit_for_bit(case: str, pool: Pool, tmp_path: Path) -> None:
    changes, options = CASES[case]
    swap, found = tmp_path / "swap", []
    in_memory = {"parallel__engine": "zero", "parallel__zero_stage": 3, "parallel__cpu_offload": True}
    in_memory["parallel__deepspeed"] = {"zero_optimization": {"sub_group_size": 600_000}}
    for name, how in (("cpu", in_memory), ("nvme", nvme(swap, **options))):
        told = pool.run(go, config_of(tmp_path, name, **changes, **how), False, timeout_s=120.0)
        assert not told[0].refused, told[0].refused
        rows = read_rows(RunFolder(tmp_path / name).metrics)
        found.append([(row["step"], row["loss"], row["grad_norm"]) for row in rows])
    assert found[0] == found[1]
    assert len(found[0]) == 6
    assert found[0][-1][1] < found[0][0][1] - 0.1
    ours, theirs = (Stored(tmp_path / name / "checkpoints/step-00000006") for name in ("nvme", "cpu"))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(ours.same(theirs, key) for key in ours.tensors)
    assert ours.manifest["step_counts"] == theirs.manifest["step_counts"]
    assert not list(swap.iterdir())


@pytest.mark.full
@pytest.mark.usefixtures("extension")
def test_stopping_and_resuming_is_going_on_bit_for_bit(pool: Pool, tmp_path: Path) -> None:
    changes = nvme(tmp_path / "swap") | {"model__dropout": 0.1}
    for name, steps in (("straight", 6), ("broken", 3), ("broken", 6)):
        told = pool.run(go, config_of(tmp_path, name, train__steps=steps, **changes), False, timeout_s=120.0)
        assert not told[0].refused, told[0].refused
    straight, broken = (Stored(tmp_path / name / "checkpoints/step-00000006") for name in ("straight", "broken"))
    assert any(key.endswith(".exp_avg_sq") for key in straight.tensors)
    assert straight.tensors.keys() == broken.tensors.keys()
    assert all(straight.same(broken, key) for key in straight.tensors)
    assert not list((tmp_path / "swap").iterdir())


@pytest.mark.full
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("what", ["loss", "gradient", "loss alone"])
def test_a_skipped_update_changes_nothing_in_the_files(what: str, tmp_path: Path) -> None:
    changes = nvme(tmp_path / "swap") | {"train__nonfinite_limit": 3}
    changes |= {f"model__{key}": value for key, value in MODEL.items()}
    run, outcomes = on_ranks(tmp_path, 2, poison, 1, {3, 4, 6}, what, train__steps=8, **changes)
    assert outcomes == [(0, 8), (0, 8)]
    assert [row["step"] for row in run.rows() if row["grad_norm"] is None] == [3, 4, 6]
    assert not list((tmp_path / "swap").iterdir())


# ---- checkpoints ----------------------------------------------------------------------------------------------------

CELLS = [
    Cell("NVMe 2", "FSDP 3", "nothing frozen"),
    Cell("FSDP 2", "NVMe 3", "nothing frozen"),
    Cell("NVMe 3", "NVMe 2", "bottom blocks"),
    Cell("NVMe 2", "ZeRO-1 3", "another set frozen than before"),
    Cell("ZeRO-1 2", "NVMe 2", "another set frozen than before"),
    Cell("ZeRO-3 3", "NVMe 2", "frozen after having trained"),
    Cell("NVMe 2", "ZeRO-3 3", "unfrozen again"),
    Cell("NVMe 2", "NVMe 3", "all but the head"),
    Cell("NVMe 2", "FSDP 2", "bottom blocks", "bf16"),
    Cell("FSDP 3", "NVMe 2", "unfrozen again", "bf16"),
    Cell("NVMe 2", "NVMe 2", "another set frozen than before", "resumed"),
]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    """The matrix of checkpoints, with a larger model, and with its own layouts."""
    root = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patched:
        for ranks in (2, 3):
            parallel = nvme(root / "swap")
            section = {key.removeprefix("parallel__"): value for key, value in parallel.items()}
            patched.setitem(cells.EVERY, f"NVMe {ranks}", (ranks, section))
        for key, value in {"dim": 250, "mlp_dim": 2100}.items():
            patched.setitem(cells.MODEL, key, value)
        patched.setitem(harness.TOLERANCE, "fp32", 2e-5)  # longer sums than the matrix's own model has; seen: 5.1e-6
        made = Matrix(root)
        yield made
        made.close()


@pytest.mark.full
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell_with_nvme(cell: Cell, matrix: Matrix) -> None:
    outcome = matrix.run(cell)
    assert outcome.refused is None
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert not list((matrix.root / "swap").iterdir())
