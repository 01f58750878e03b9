"""DeepSpeed ZeRO behind the engine protocol: the same weights at the start, and the same losses as FSDP."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from configs.config import Config
from configs.deepspeed import deepspeed_settings
from configs.errors import UserError
from configs.schema.parallel import ParallelSection
from tests.distributed import tiny
from tests.matrix.checks import put_together
from tests.matrix.ranks import go
from tests.pool import Pool
from tests.stored import bits
from trainer.engines import check_engine, check_package
from trainer.life.folder import RunFolder
from trainer.life.rows import read_rows

STEPS = 4
# Of losses between 5 and 5.6; seen: 5e-7 in fp32, where a number's last bit is 4.8e-7, and 1.2e-4 in bf16.
TOLERANCE = {"fp32": 5e-6, "bf16": 2e-3}
FROZEN = {"frozen": ["embed.*", "blocks.0.*"]}

CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("accumulated", 2, {"train__micro_batch": 2}),
    ("bf16-frozen", 2, {"train__micro_batch": 3, "precision__compute": "bf16", "freeze": FROZEN}),
]
FURTHER: list[tuple[str, int, dict[str, Any]]] = [
    ("frozen", 4, {"train__micro_batch": 2, "freeze": FROZEN}),
    ("whole", 4, {"train__micro_batch": 16}),
    ("bf16", 4, {"precision__compute": "bf16", "train__micro_batch": 2}),
    ("alone", 1, {"precision__compute": "bf16", "train__micro_batch": 5, "freeze": FROZEN}),
    ("three", 3, {"train__micro_batch": 2}),
    ("recomputed", 2, {"parallel__activation_checkpoint": "full", "freeze": FROZEN}),
    ("selective", 2, {"parallel__activation_checkpoint": "selective", "precision__compute": "bf16"}),
    ("compiled", 2, {"parallel__compile": True, "parallel__activation_checkpoint": "selective", "freeze": FROZEN}),
    ("offloaded", 2, {"parallel__cpu_offload": True, "freeze": FROZEN}),
    ("sgd", 2, {"optim__name": "sgd", "optim__lr": 0.1}),
]

SECONDARY = {"zero_optimization": {"zero_hpz_partition_size": 2}}


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Pool]]:
    made: dict[int, Pool] = {}
    yield made
    for pool in made.values():
        pool.close()


def trained(
    pool: Pool, root: Path, name: str, changes: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The metrics of a whole run, and its first weights, put together from all ranks."""
    config = tiny(root, run__dir=str(root / name), checkpoint__every_steps=0, **changes)
    told = pool.run(go, config, False, timeout_s=240.0)
    assert not told[0].refused, told[0].refused
    whole, _, wrong = put_together([rank.loaded for rank in told])
    assert not wrong
    rows = read_rows(RunFolder(root / name).metrics)
    return rows, {key: bits(tensor.float()) for key, tensor in whole.items()}


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        *[pytest.param(size, changes, id=f"{name}-{size}") for name, size, changes in CASES],
        *[pytest.param(size, changes, id=f"{name}-{size}", marks=pytest.mark.full) for name, size, changes in FURTHER],
    ],
)
def test_losses_and_metrics_are_those_of_fsdp(
    size: int, changes: dict[str, Any], pools: dict[int, Pool], tmp_path: Path
) -> None:
    pool = pools.setdefault(size, Pool(size))
    every = {"train__steps": STEPS, "train__global_batch": 16, "train__micro_batch": 4, **changes}
    offloaded = every.get("parallel__cpu_offload", False) and size > 1
    expected, weights = trained(pool, tmp_path, "fsdp", {**every, "parallel__cpu_offload": offloaded})
    assert len(expected) == STEPS
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.05
    tolerance = TOLERANCE[every.get("precision__compute", "fp32")]
    for stage in (1, 2, 3):
        zero = {"parallel__engine": "zero", "parallel__zero_stage": stage}
        found, began = trained(pool, tmp_path, f"zero{stage}", {**every, **zero})
        assert began == weights, stage
        assert [set(row) for row in found] == [set(row) for row in expected]
        for key in ("step", "target_tokens", "consumed_samples", "lr"):
            assert [row[key] for row in found] == [row[key] for row in expected], (stage, key)
        for key, factor in (("loss", 1), ("grad_norm", 10)):
            wanted = pytest.approx([row[key] for row in expected], abs=factor * tolerance)
            assert [row[key] for row in found] == wanted, (stage, key)


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 4])
def test_secondary_partitions_change_no_bit(size: int, pools: dict[int, Pool], tmp_path: Path) -> None:
    """ZeRO++'s secondary partitions. A run goes on with them from its checkpoint, and then without them under FSDP."""
    pool = pools.setdefault(size, Pool(size))
    common = {"train__global_batch": 16, "train__micro_batch": 4, "optim__schedule": "constant"}
    zero: dict[str, Any] = {"parallel__engine": "zero", "parallel__zero_stage": 3}
    rows = {}
    for name, changes in (("plain", zero), ("secondary", {**zero, "parallel__deepspeed": SECONDARY})):
        for steps, engine in ((3, changes), (6, changes), (8, {})):
            rows[name], _ = trained(pool, tmp_path, name, {**common, **engine, "train__steps": steps})
    numbers = {name: [(row["step"], row["loss"], row["grad_norm"]) for row in found] for name, found in rows.items()}
    assert [step for step, _, _ in numbers["plain"]] == list(range(1, 9))
    assert numbers["secondary"] == numbers["plain"]


# ---- what cannot be -------------------------------------------------------------------------------------------------


def test_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    check_package(ParallelSection())
    with pytest.raises(UserError, match=r"^parallel.engine=zero needs deepspeed>=0.19.8,<0.20, and there is none\n"):
        check_package(ParallelSection(engine="zero"))


@pytest.mark.parametrize(
    ("version", "good"), [("0.19.7", False), ("0.19.8", True), ("0.19.9+x", True), ("0.20", False)]
)
def test_another_deepspeed(version: str, good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    if good:
        check_package(ParallelSection(engine="zero"))
    else:
        with pytest.raises(UserError, match=f"<0.20, and {version} is installed\n"):
            check_package(ParallelSection(engine="zero"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim__name": "muon"}, "optim.name muon needs them whole"),
        ({"precision__params": "bf16", "precision__compute": "bf16"}, "precision.params must be fp32"),
        ({"parallel__tensor": 2}, "parallel.tensor must be 1"),
        ({"parallel__replicate": -1, "parallel__shard": 1}, "parallel.replicate must be 1"),
        ({"parallel__deepspeed": {"gradient_clipping": 0.5}}, "gradient_clipping 0.5 contradicts train.clip_norm"),
        ({"parallel__deepspeed": {"zero_optimization": {"stage": 1}}}, "stage 1 contradicts parallel.zero_stage"),
        ({"parallel__deepspeed": {"optimizer": {"type": "Lion"}}}, "optimizer.type is not DeepSpeed's to say: optim"),
        ({"parallel__deepspeed": {"bf16": {"enabled": True}}}, "bf16.enabled True contradicts precision.compute"),
        ({"parallel__deepspeed": {"zero_optimisation": {"stage": 3}}}, "zero_optimisation.stage is no setting"),
        (
            {"parallel__deepspeed": {"zero_optimization": {"offload_param": {"device": "disk"}}}},
            "offload_param.device can be cpu",
        ),
        (
            {"parallel__deepspeed": SECONDARY, "freeze__frozen": ["embed.*"]},
            "hpz_partition_size with frozen parameters",
        ),
    ],
)
def test_a_contradiction_is_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = tiny(tmp_path, parallel__engine="zero", **{k: v for k, v in changes.items() if "__" in k})
    with pytest.raises(ValueError, match=words):
        Config.model_validate(config)


def test_what_a_recipe_says_alike_is_no_contradiction(tmp_path: Path) -> None:
    recipe = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "reduce_bucket_size": "auto"},
        "wall_clock_breakdown": True,
    }
    built = Config.model_validate(tiny(tmp_path, parallel__engine="zero", parallel__deepspeed=recipe))

    settings = deepspeed_settings(built)
    assert settings["zero_optimization"] == {"stage": 3, "overlap_comm": True, "memory_efficient_linear": False}
    assert settings["wall_clock_breakdown"] is True
    assert settings["gradient_accumulation_steps"] == settings["train_micro_batch_size_per_gpu"] == 1
    assert "gradient_clipping" not in settings  # set anew in each step
    assert "train_batch_size" not in settings


def test_what_a_recipe_leaves_empty_is_not_given(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"zero_optimization": {"offload_param": None, "offload_optimizer": {}}}
    config = Config.model_validate(
        tiny(tmp_path, parallel__engine="zero", parallel__cpu_offload=True, parallel__deepspeed=recipe)
    )
    assert deepspeed_settings(config)["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert config.parallel.deepspeed == recipe


def test_secondary_partitions_that_do_not_divide_the_ranks() -> None:
    parallel = ParallelSection(engine="zero", deepspeed=SECONDARY)
    check_engine(parallel, 4)
    with pytest.raises(UserError, match="zero_hpz_partition_size 2 does not divide 3 ranks"):
        check_engine(parallel, 3)


def test_a_setting_that_deepspeed_does_not_know_is_refused(pools: dict[int, Pool], tmp_path: Path) -> None:
    unknown = {"zero_optimization": {"overlap_com": True}}
    config = tiny(tmp_path, parallel__engine="zero", parallel__deepspeed=unknown)
    told = pools.setdefault(2, Pool(2)).run(go, config, False)
    for rank in told:
        assert rank.refused.startswith("parallel.deepspeed: DeepSpeed refuses zero_optimization: overlap_com: ")
    assert not (tmp_path / "run/config.yaml").exists()
