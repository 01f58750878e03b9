"""Tensor parallelism learns what one process learns, whatever it is combined with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.config import Config
from configs.errors import UserError
from configs.load import load
from tests.distributed import run_ranks, tiny, train, write_config
from tests.engines import rows as once
from trainer.life.folder import RunFolder
from trainer.life.rows import read_rows

ORDER_OF_SUMMATION = 2e-5  # of losses; see tests/test_train.py
BF16 = 5e-4
NORM_TOLERANCE = 2e-6  # relative; seen: up to 4e-7

LLAMA: dict[str, Any] = {"model__heads": 4, "model__kv_heads": 2, "model__vocab_size": 263, "model__mlp_dim": 65}
GPT2: dict[str, Any] = {
    "model__position": "learned",
    "model__tie_embeddings": True,
    "model__norm": "layernorm",
    "model__mlp": "gelu_tanh",
    "model__qkv_bias": True,
    "model__out_bias": True,
    "model__mlp_bias": True,
    "model__mlp_dim": 63,
    "data__seq_len": 31,
    "data__document_mask": True,
}
QWEN: dict[str, Any] = {
    "model__qk_norm": True,
    "model__head_dim": 24,
    "model__vocab_size": 261,
    "task__z_loss": 1e-2,
    "task__loss_chunk_tokens": 50,
    "freeze__frozen": ["embed.*", "blocks.0.attn.*", "blocks.1.mlp_norm.*", "blocks.1.mlp.down.*"],
    "freeze__trainable": ["blocks.0.attn.q_norm.weight"],
}
SHAPES = {"llama": LLAMA, "gpt2": GPT2, "qwen": QWEN}
STEPS = 4  # a wrong part shows in the second: see tests/test_train.py
COMMON: dict[str, Any] = {
    "train__steps": STEPS,
    "train__global_batch": 12,
    "train__clip_norm": 0.5,  # every step is clipped
    "train__validate_every_steps": STEPS // 2,
    "checkpoint__every_steps": 100,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {}),
    "tensor-shard": (4, {}),
    "tensor-replicate": (4, {"parallel__replicate": 2, "parallel__shard": 1}),
}


def rows(config: dict[str, Any]) -> list[dict[str, Any]]:
    return read_rows(RunFolder(Path(config["run"]["dir"])).metrics)


def column(config: dict[str, Any], name: str) -> list[float]:
    return [row[name] for row in rows(config) if name in row]


def same_curves(ours: dict[str, Any], theirs: dict[str, Any], steps: int = STEPS) -> None:
    assert len(column(ours, "loss")) == steps
    assert column(ours, "loss") == pytest.approx(column(theirs, "loss"), abs=ORDER_OF_SUMMATION)
    assert column(ours, "grad_norm") == pytest.approx(column(theirs, "grad_norm"), rel=NORM_TOLERANCE)
    validations = column(ours, "validation_loss")
    assert validations == pytest.approx(column(theirs, "validation_loss"), abs=ORDER_OF_SUMMATION)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The configs of runs that one process has made."""
    made = {}
    for name, shape in SHAPES.items():
        made[name] = tiny(tmp_path_factory.mktemp(name), **COMMON, **shape)
        assert train(made[name]) == [0]
        assert len(column(made[name], "validation_loss")) == 2
        assert min(column(made[name], "grad_norm")) > COMMON["train__clip_norm"]
    return made


ONCE = [("llama", "tensor-shard"), ("gpt2", "tensor-replicate"), ("qwen", "tensor")]


@pytest.mark.parametrize(("shape", "layout"), once(ONCE, SHAPES, LAYOUTS))
def test_the_curve_is_that_of_one_process(
    shape: str, layout: str, alone: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    size, changes = LAYOUTS[layout]
    config = tiny(tmp_path, **COMMON, **SHAPES[shape], **changes, parallel__tensor=2)
    assert train(config, size) == [0] * size
    same_curves(config, alone[shape])


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "uneven on every side": (6, {}),
    "offloaded": (4, {"parallel__cpu_offload": True, "parallel__reshard": False}),
    "full checkpointing": (2, {"parallel__activation_checkpoint": "full"}),
    "selective checkpointing": (4, {"parallel__activation_checkpoint": "selective"}),
    "whole gradients between micro batches": (4, {"parallel__accumulate": "unsharded", "train__micro_batch": 2}),
    "compiled": (2, {"parallel__compile": True, "parallel__activation_checkpoint": "selective"}),
}


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
def test_other_settings_of_the_engine_do_not_matter(way: str, alone: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    size, changes = WAYS[way]
    config = tiny(tmp_path, **{**COMMON, **LLAMA, **changes, "parallel__tensor": 2})
    assert train(config, size, timeout_s=280) == [0] * size  # compiling takes a while
    same_curves(config, alone["llama"])


@pytest.mark.full
def test_bf16_stays_near_one_process(tmp_path: Path) -> None:
    """Partial sums are rounded to bf16 before they are added. Seen: up to 1.6e-4, and 1.2e-4 for FSDP alone."""
    changes = {**COMMON, **LLAMA, "precision__compute": "bf16"}
    one, four = tiny(tmp_path / "one", **changes), tiny(tmp_path / "four", **changes, parallel__tensor=2)
    assert train(one) == [0]
    assert train(four, 4) == [0] * 4
    assert column(four, "loss") == pytest.approx(column(one, "loss"), abs=BF16)
    assert column(four, "loss") != pytest.approx(column(one, "loss"), abs=ORDER_OF_SUMMATION)


@pytest.mark.full
def test_muon_sees_whole_matrices(tmp_path: Path) -> None:
    """It iterates in bf16, which blows up the last bits: FSDP alone parts from one process by up to 1.6e-5 in 6 steps,
    this by 1.3e-5. Half a matrix, or one put together wrongly, parts by more than 1e-3."""
    changes = {**LLAMA, "train__steps": 4, "optim__name": "muon"}
    one, six = tiny(tmp_path / "one", **changes), tiny(tmp_path / "six", **changes, parallel__tensor=2)
    assert train(one) == [0]
    assert train(six, 6) == [0] * 6
    assert column(six, "loss") == pytest.approx(column(one, "loss"), abs=2e-4)


# ---- what stands around a step --------------------------------------------------------------------------------------


def test_every_sample_is_given_once_and_noted_once(tmp_path: Path) -> None:
    config = tiny(tmp_path, train__steps=3, train__global_batch=5, data__record_samples=True, parallel__tensor=2)
    assert train(config, 4) == [0] * 4
    found: dict[int, list[int]] = {}
    for path in Path(config["run"]["dir"]).glob("attempts/000/samples-*.jsonl"):
        for row in read_rows(path):
            found.setdefault(row["step"], []).extend(row["samples"])
    assert {step: sorted(samples) for step, samples in found.items()} == {
        1: [0, 1, 2, 3, 4],
        2: [5, 6, 7, 8, 9],
        3: [10, 11, 12, 13, 14],
    }


def wish_on(rank: int, config: dict[str, Any]) -> int:
    """A run that only one rank wishes to leave, at step 2."""
    from trainer.data.batch import StepBatch
    from trainer.life.stop import Cause, StopWish
    from trainer.run import Run
    from trainer.start import start

    class Wishing(Run):
        def record_samples(self, batch: StepBatch) -> None:
            if batch.step == 2 and self.world.rank == rank:
                self.wish.wish(Cause.INTERRUPT)

    return start(Config.model_validate(config), StopWish(), Wishing)


def test_a_wish_of_a_rank_that_counts_nothing_is_heard(tmp_path: Path) -> None:
    config = tiny(tmp_path, parallel__tensor=2)
    assert run_ranks(2, wish_on, 1, config) == [3, 3]
    assert column(config, "step") == [1, 2, 3]  # the wish is read while step 3 is made


def spoil(config: dict[str, Any]) -> int:
    """A run in which the loss of step 2 is not finite on the second data rank, for both of its ranks."""
    from trainer.data.batch import Batch
    from trainer.life.stop import StopWish
    from trainer.run import Run
    from trainer.start import start

    class Spoilt(Run):
        def build(self) -> None:
            super().build()
            plain, steps, world = self.engine.forward_backward, iter([1, 2, 3]), self.world

            def forward_backward(batch: Batch, scale: Any, last: bool) -> Tensor:
                bad = next(steps) == 2 and world.data_rank == 1
                return plain(batch, lambda: scale() * (torch.nan if bad else 1), last) * (torch.nan if bad else 1)

            self.engine.forward_backward = forward_backward  # type: ignore[method-assign]

    return start(Config.model_validate(config), StopWish(), Spoilt)


def test_bad_samples_are_named_once(tmp_path: Path) -> None:
    config = tiny(tmp_path, train__steps=3, parallel__tensor=2)
    assert run_ranks(4, spoil, config) == [0] * 4
    named = [
        row
        for path in Path(config["run"]["dir"], "events").glob("*.jsonl")
        for row in read_rows(path)
        if row["event"] == "nonfinite"
    ]
    assert [(row["what"], row["samples"]) for row in named] == [("loss", [9, 11, 13, 15])]
    assert [row["grad_norm"] is None for row in rows(config)] == [False, True, False]


def logits(config: dict[str, Any]) -> list[list[float]]:
    from trainer.engines.fsdp import FsdpEngine
    from trainer.ranks import world as worlds
    from trainer.tasks.lm import LanguageModelling

    built = Config.model_validate(config)
    engine = FsdpEngine(built, worlds.start(built), LanguageModelling(built.task))
    engine.set_trainable(engine.parameters())
    engine.initialise(0)
    tokens = [torch.arange(length)[None] for length in (1, 4, 31)]
    return [engine.call(lambda model, t=t: model(t)[:, -1].float())[0].tolist() for t in tokens]


@pytest.mark.parametrize("shape", ["llama", pytest.param("gpt2", marks=pytest.mark.full)])
def test_every_rank_gets_the_logits_of_one_process(shape: str, tmp_path: Path) -> None:
    """Also with fewer tokens than ranks."""
    (expected,) = run_ranks(1, logits, tiny(tmp_path, **SHAPES[shape]))
    for found in run_ranks(4, logits, tiny(tmp_path, **SHAPES[shape], parallel__tensor=2)):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)


def test_dropout_differs_between_ranks_and_survives_recomputing(tmp_path: Path) -> None:
    """Each rank draws for its own tokens and heads. A block that is computed again draws the same."""
    changes = {"train__steps": 4, "model__dropout": 0.3, "parallel__tensor": 2}
    found = []
    for how in ("none", "full"):
        config = tiny(tmp_path / how, **changes, parallel__activation_checkpoint=how)
        assert train(config, 2) == [0, 0]
        found.append(column(config, "loss"))
    assert found[0] == found[1]
    masks = run_ranks(2, dropped, tiny(tmp_path, model__dropout=0.3, parallel__tensor=2))
    assert masks[0] != masks[1]


def dropped(config: dict[str, Any]) -> list[bool]:
    """Which channels of this rank's first token are dropped after the embedding."""
    from trainer.agreement import Agreement
    from trainer.data.batch import Batch, StepBatch
    from trainer.engines.fsdp import FsdpEngine
    from trainer.life.stop import StopWish
    from trainer.ranks import world as worlds
    from trainer.step import train_step
    from trainer.tasks.lm import LanguageModelling

    built = Config.model_validate(config)
    world = worlds.start(built)
    engine = FsdpEngine(built, world, LanguageModelling(built.task))
    engine.set_trainable(engine.parameters())
    engine.initialise(0)
    seen: list[Tensor] = []
    engine.model.drop.register_forward_hook(lambda module, args, out: seen.append(out == 0))
    tokens = torch.arange(32)[None]
    batch = StepBatch(1, [Batch({"tokens": tokens, "targets": tokens}, 1)], (32.0,), torch.arange(1).numpy(), 1, 32)
    train_step(engine, batch, built, Agreement(world, StopWish()), with_sums=False)
    return seen[0][0, 0].tolist()


# ---- memory ---------------------------------------------------------------------------------------------------------


class LargestLocal(TorchDispatchMode):
    """Records the largest plain tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = (0,)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if type(leaf) is Tensor and leaf.numel() > torch.Size(self.shape).numel():
                self.shape = tuple(leaf.shape)
        return out


def largest(config: dict[str, Any]) -> tuple[int, ...]:
    from trainer.data.batch import Batch
    from trainer.engines.fsdp import FsdpEngine
    from trainer.ranks import world as worlds
    from trainer.tasks.lm import LanguageModelling

    built = Config.model_validate(config)
    engine = FsdpEngine(built, worlds.start(built), LanguageModelling(built.task))
    engine.set_trainable(engine.parameters())
    engine.initialise(0)
    tokens = torch.arange(64).view(2, 32)
    with LargestLocal() as seen:
        engine.forward_backward(Batch({"tokens": tokens, "targets": tokens}, 2), lambda: torch.tensor(0.1), last=True)
    return seen.shape


def test_no_rank_holds_logits_of_all_words(tmp_path: Path) -> None:
    """Not even for one chunk: the largest tensor of forward and backward is a chunk of this rank's words."""
    changes = {"model__vocab_size": 4001, "model__dim": 8, "task__loss_chunk_tokens": 16, "task__z_loss": 1e-3}
    assert run_ranks(1, largest, tiny(tmp_path, **changes)) == [(16, 4001)]
    assert run_ranks(2, largest, tiny(tmp_path, **changes, parallel__tensor=2)) == [(16, 2001), (16, 2000)]


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model__heads": 3, "model__dim": 30},
            "model.heads 3 is not a multiple of parallel.tensor 2.*use a .* of 1 or 3 ",
        ),
        ({"model__kv_heads": 1}, "model.kv_heads 1 is not a multiple of parallel.tensor 2"),
        ({"model__heads": 12, "model__dim": 48, "parallel__tensor": 5}, "use a parallel.tensor of 1 or 2 or 3 or 4 or"),
        (
            {"model__heads": 4, "parallel__tensor": 4, "model__mlp_dim": 5},
            "model.mlp_dim 5 leaves no part for the last",
        ),
        ({"model__position": "learned", "model__max_seq_len": 31, "data__seq_len": 31}, "use data.seq_len=30 or"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write_config(tmp_path, **{"parallel__tensor": 2, **changes})
    with pytest.raises(UserError, match=said):
        load(str(path), [])
    assert not (tmp_path / "run").exists()


def test_every_parameter_has_a_place_in_the_plan(tmp_path: Path) -> None:
    from models import PLANS, build_model
    from trainer.engines.tensor import _matches

    for shape in SHAPES.values():
        with torch.device("meta"):
            built = build_model(Config.model_validate(tiny(tmp_path, **shape)).model)
        plan = built.plan
        assert plan is PLANS["decoder"]
        kinds = (plan.columns, plan.rows, plan.whole, plan.positions, plan.vocabulary)
        for name, module in built.module.named_modules():
            places = sum(_matches(name, kind) for kind in kinds)
            assert places == bool(list(module.parameters(recurse=False))), name


def split_with_a_norm_of_its_own(config: dict[str, Any]) -> str:
    from models import Decoder
    from models.build import REGISTRY
    from tests.matrix.model import as_model
    from trainer.life.stop import StopWish
    from trainer.start import start

    class Scaled(torch.nn.RMSNorm):
        """Computes more than the norm, which would be lost: parts of a norm compute only the norm."""

        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Own(Decoder):
        def __init__(self, section: Any) -> None:
            super().__init__(section)
            self.norm = Scaled(section.dim, eps=section.norm_eps)

    REGISTRY["decoder"] = lambda section: as_model(Own(section))
    assert start(Config.model_validate(config), StopWish()) == 1
    return Path(config["run"]["dir"], f"attempts/000/rank-{int(os.environ['RANK']):05d}.log").read_text()


def test_a_module_that_may_compute_something_else_is_not_split(tmp_path: Path) -> None:
    config = tiny(tmp_path, parallel__tensor=2, train__steps=1)
    said = run_ranks(2, split_with_a_norm_of_its_own, config)
    assert all("norm is a Scaled: nothing is known of how to split that" in text for text in said)
