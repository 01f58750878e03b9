"""Every number has an upper bound, every path follows one rule, and contradictions of the run's length are reported."""

from __future__ import annotations

import os
import pwd
import re
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest

from configs.config import Config
from configs.errors import UserError
from configs.explain import sections_of
from configs.load import dump, load
from configs.paths import MOST_NAME_BYTES, MOST_PATH_BYTES, expanded
from configs.schema.section import Section, keys
from trainer.host.memory import check_memory, parameters
from trainer.schedule import check_rates, lr_factor, rate_change, remarks


def refused(*overrides: str, preset: str = "demo") -> str:
    with pytest.raises(UserError) as error:
        load(preset, list(overrides))
    return str(error.value)


# ---- numbers


def numbers(annotation: Any, limits: list[Any]) -> Iterator[tuple[type, set[str]]]:
    """Each type of number inside an annotation, with the names of its limits."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        yield from numbers(inner, [m for one in more for m in getattr(one, "metadata", [one])] + limits)
    elif origin is list or origin is dict:
        yield from numbers(get_args(annotation)[-1], [])
    elif origin is not None and origin is not typing.Literal:
        for option in get_args(annotation):
            yield from numbers(option, limits)
    elif annotation in (int, float):
        yield annotation, {name for m in limits for name in ("gt", "ge", "lt", "le") if hasattr(m, name)}


def fields_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, info in keys(section).items():
        inner, _ = sections_of(info.annotation)
        if not inner:
            yield prefix + name, info
        for one in inner:
            yield from fields_of(one, f"{prefix}{name}.")


def test_every_number_has_a_lower_and_an_upper_bound() -> None:
    found = [
        (key, kind, limits)
        for key, info in fields_of(Config)
        for kind, limits in numbers(info.annotation, list(info.metadata))
    ]
    assert len(found) > 60
    by_rule = {"optim.betas"}  # each in [0, 1), by a rule of the section
    open_ = [key for key, _, limits in found if len(limits) < 2 and key not in by_rule]
    assert open_ == []


@pytest.mark.parametrize(
    "override",
    [
        "parallel.load_timeout_s=1e308",
        "train.global_batch=1000000000",
        "model.vocab_size=9223372036854775807",
        "model.layers=9223372036854775807",
        "optim.lr=1e308",
        "monitor.profile_steps=[1, 99999999999]",
        "monitor.profile_ranks=[-1]",
        "optim.betas=[0.9, 1e308]",
        "parallel.deepspeed={aio: {block_size: 1e300}}",
        "parallel.deepspeed={aio: {block_size: .inf}}",
        "parallel.deepspeed={aio: {block_size: .nan}}",
        f"train.steps={'9' * 5000}",
    ],
)
def test_a_number_beyond_its_bound_is_refused_by_key(override: str) -> None:
    key = override.partition("=")[0].partition(".")[0]
    assert len(refused(override).splitlines()) == 1
    assert key in refused(override)


def test_what_people_write_for_ever_is_taken() -> None:
    """A resume accepts it too: the config.yaml of older runs holds it."""
    times = ["checkpoint.keep.last", "checkpoint.failures_limit", "run.max_restarts", "run.give_up_after"]
    more = ["monitor.idle_windows", "monitor.slow_share", "monitor.most_mib", "train.micro_batch"]
    seconds = ["parallel.load_timeout_s", "parallel.step_timeout_s", "run.stop_grace_s", "train.time_limit_s"]
    begun = load(
        "demo", [f"{key}=1e9" if key.endswith("_s") else f"{key}=1000000000" for key in (*times, *more, *seconds)]
    )
    assert (begun.checkpoint.keep.last, begun.parallel.step_timeout_s) == (10**9, 1e9)
    load("demo", ["monitor.hang_s=1e9", "monitor.window_s=1e9"])


# ---- memory


def test_what_this_machine_cannot_hold_is_said_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trainer.host.memory._machine_bytes", lambda: 10**9)
    monkeypatch.setattr("trainer.host.memory._DRIVER", tmp_path / "gone")
    check_memory(load("demo", []), 2, 2)
    with pytest.raises(UserError, match=r"train.global_batch 1000000 of data.seq_len 256 needs 15 GB.* has 1 GB"):
        check_memory(load("demo", ["train.global_batch=1000000"]), 2, 2)
    for override in ("model.layers=10000", "model.vocab_size=1000000"):
        with pytest.raises(
            UserError, match=r"model: .* need .* GB in 2 of 2 processes, this machine has 1 GB and no GPU"
        ):
            check_memory(load("demo", [override]), 2, 2)
    eight = load("llama3-8b", ["train.global_batch=8", "data.seq_len=128"])
    check_memory(eight, 1, 1000)  # a thousandth of the memory fits
    check_memory(load("llama3-8b", ["train.global_batch=8", "freeze.frozen=['*']"]), 1, 20)
    monkeypatch.setattr("trainer.host.memory._DRIVER", Path("/"))  # as if the model were in GPUs
    check_memory(eight, 1, 1)


@pytest.mark.parametrize("preset", ["demo", "llama3-1b", "llama3-8b"])
def test_parameters_are_those_of_the_model(preset: str) -> None:
    import torch

    from models import build_model
    from models.flops import parameter_count

    config = load(preset, [])
    with torch.device("meta"):
        model = build_model(config.model).module
    assert parameters(config.model) == pytest.approx(parameter_count(model), rel=2e-3)


# ---- paths

PATHS = {
    "run.dir": lambda c: c.run.dir,
    "data.cache": lambda c: c.data.cache,
    "start.from": lambda c: c.start.from_,
    "data.tokenizer": lambda c: c.data.tokenizer,
    "data.sources.0.path": lambda c: c.data.sources[0].path,
    "data.sources.0.labels": lambda c: c.data.sources[0].labels,
    "slurm.container": lambda c: c.slurm.container,
    "slurm.python": lambda c: c.slurm.python,
    "parallel.deepspeed.zero_optimization.offload_param.nvme_path": lambda c: c.parallel.deepspeed["zero_optimization"][
        "offload_param"
    ]["nvme_path"],
    "parallel.deepspeed.tensorboard.output_path": lambda c: c.parallel.deepspeed["tensorboard"]["output_path"],
}


def test_every_key_that_names_a_path_is_among_them() -> None:
    def is_path(annotation: Any, metadata: list[Any]) -> bool:
        return "expanded" in str(annotation) + str(metadata)

    found = {key for key, info in fields_of(Config) if is_path(info.annotation, list(info.metadata))}
    assert {key.replace("sources.", "sources.0.") for key in found} == {k for k in PATHS if "deepspeed" not in k}


@pytest.mark.parametrize("key", PATHS)
def test_one_rule_for_every_path(key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preset = "digits-mlp" if key.endswith("labels") else "demo"
    monkeypatch.setenv("HOME", "/home/anna")
    for typed, meant in (("~/a b", "/home/anna/a b"), ("a/~", "a/~"), ("./~x", "./~x"), ("~", "/home/anna")):
        if "deepspeed" in key and typed == "~":
            continue  # this key takes any value, and ~ is YAML's null
        config = load(preset, [f"{key}={typed}"])
        assert PATHS[key](config) == meant
        path = tmp_path / "config.yaml"
        path.write_text(dump(config))
        monkeypatch.setenv("HOME", "/root")  # as in a job or container
        assert load(str(path), []) == config
        monkeypatch.setenv("HOME", "/home/anna")
    first = pwd.getpwuid(0)
    assert PATHS[key](load(preset, [f"{key}=~{first.pw_name}/x"])) == f"{first.pw_dir.rstrip('/')}/x"
    for typed, reason in (
        ("~no-such-user/x", "there is no user 'no-such-user'; write ./~no-such-user/x for a folder of that name"),
        ("x/" + "a" * 256, f"a name in it has 256 bytes, {MOST_NAME_BYTES} are the most"),
        ("ä" * 128, "a name in it has 256 bytes"),
        ("ab/" * 1500, f"it has 4500 bytes, {MOST_PATH_BYTES} are the most"),
    ):
        message = refused(f"{key}={typed}", preset=preset)
        assert reason in message
        assert key.removesuffix(".nvme_path").split(".")[0] in message
    assert PATHS[key](load(preset, [f"{key}=./~no-such-user/x"])) == "./~no-such-user/x"


def test_no_home_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    assert refused("data.cache=~/x").endswith(
        "data.cache: HOME is not set, and this user id has no name: write the whole path instead of ~"
    )
    assert load("demo", []).run_dir == "runs/demo"
    monkeypatch.setenv("HOME", "here")
    assert "HOME is no absolute path" in refused("data.cache=~/x")


def test_bytes_that_no_path_has() -> None:
    with pytest.raises(ValueError, match="NUL"):
        expanded("a\0b")
    with pytest.raises(ValueError, match="UTF-8"):
        expanded(os.fsdecode(b"\xff"))
    assert "a name in it has 300 bytes" in refused("run.name=" + "x" * 300)


# ---- the length of the run

WSD = ["optim.schedule=wsd", "optim.warmup_steps=4"]


def test_a_schedule_that_does_not_fit_is_refused_with_the_numbers_and_the_advice_helps() -> None:
    for warmup_steps, decay_steps, effect in (
        *((0, 11, "begin below its peak"), (4, 7, "drop at once"), (4, 10, "drop at once"), (4, 100, "drop at once")),
        *((9, 2, "drop at once"), (10, 1, "never come"), (20, 5, "never come")),
    ):
        typed = ["optim.schedule=wsd", f"optim.warmup_steps={warmup_steps}", f"optim.decay_steps={decay_steps}"]
        typed += ["train.steps=10", "optim.final_lr_ratio=0"]
        optim = load("demo", typed).optim
        rates = [lr_factor(optim, step, 10) for step in range(1, 11)]
        falls = [before - after for before, after in pairwise(rates)]
        if effect == "begin below its peak":
            assert rates[0] < 1
        elif effect == "never come":
            assert max(falls) < 0
        else:  # more than the decay does in one step
            assert falls[warmup_steps - 1] > 1 / decay_steps + 1e-9
        with pytest.raises(UserError, match=rf"(?m)need \d+ steps, train\.steps is 10: .* would {effect}") as error:
            check_rates(load("demo", typed))
        advice = re.findall(r"(?:use|for a trial:) (\S+?=\w+)", str(error.value))
        assert [word.partition("=")[0] for word in advice] == ["train.steps", "optim.schedule"]
        for advised in advice:
            check_rates(load("demo", [*typed, advised]))
    check_rates(load("demo", [*WSD, "optim.decay_steps=6", "train.steps=10"]))
    check_rates(load("demo", [*WSD, "optim.decay_steps=6", "train.steps=0"]))


def test_no_schedule_that_is_let_through_jumps() -> None:
    for schedule in ("cosine", "linear", "wsd", "constant"):
        for warmup in (0, 1, 4, 9, 10):
            config = load(
                "demo",
                [f"optim.schedule={schedule}", f"optim.warmup_steps={warmup}", "optim.decay_steps=5", "train.steps=20"],
            )
            check_rates(config)
            rates = [lr_factor(config.optim, step, 20) for step in range(1, 21)]
            assert max(rates) > 0.9
            assert all(abs(a - b) <= 1 / max(warmup, 1) + 0.2 for a, b in pairwise(rates))


def test_a_run_cut_short_for_a_trial_is_told_of_and_goes_on() -> None:
    short = load("demo", ["train.steps=2"])
    check_rates(short)
    assert remarks(short) == [
        "optim.warmup_steps 20 is more than train.steps 2: the learning rate ends at 10.00% of its peak"
    ]
    assert remarks(load("demo", [])) == remarks(load("demo", ["train.steps=0"])) == []
    frozen = load("demo", ["freeze.schedule=[{step: 300, frozen: [a]}]", "monitor.profile_steps=[300, 301]"])
    assert [line.split(":")[0] for line in remarks(frozen)] == ["freeze.schedule", "monitor.profile_steps"]


def test_what_other_steps_make_of_the_rate_is_said() -> None:
    config = load("demo", ["train.steps=400"])
    line = rate_change(config, 200, 100)
    assert line.startswith("train.steps 200 -> 400: the learning rate of step 101 goes from ")
    old, new = (config.optim.lr * lr_factor(config.optim, 101, last) for last in (200, 400))
    assert f"from {old:.3g} to {new:.3g} (cosine)" in line
    assert "stays 0.003 (constant)" in rate_change(load("demo", ["optim.schedule=constant"]), 100, 50)


def test_weight_decay_inside_the_gradient_is_asked_for() -> None:
    found = {name: load("demo", [f"optim.name={name}"]).optim.weight_decay for name in ("adamw", "muon", "adam", "sgd")}
    assert found == {"adamw": 0.1, "muon": 0.1, "adam": 0.0, "sgd": 0.0}
    given = load("demo", ["optim.name=adam", "optim.weight_decay=0.1"])
    assert given.optim.weight_decay == 0.1
    assert Config.model_validate(given.model_dump(by_alias=True)) == given
