"""The advice of a message is followed here, and helps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import load
from trainer.debug import cut_to_size
from trainer.host.arguments import config_parser, take
from trainer.life.folder import RunFolder
from trainer.preflight import check_folder, write_config
from trainer.schedule import check_rates


def advised_of(words: list[str]) -> str:
    """What the error advises to write instead."""
    with pytest.raises(UserError) as error:
        take(config_parser("trainer", ""), words)
    return str(error.value).rpartition(": ")[2]


@pytest.mark.parametrize(
    ("words", "advised"),
    [
        (["--train.steps", "10"], "train.steps=10"),
        (["--train.steps=10"], "train.steps=10"),
        (["demo", "train.steps", "10"], "train.steps=10"),
        (["demo", "-train.steps", "10"], "train.steps=10"),
        (["train.steps"], "train.steps=VALUE"),
        (["--data.sources.0.path", "x"], "data.sources.0.path=x"),
        (["--config", "demo"], "demo"),
        (["--config=demo", "train.steps=3"], "demo"),
    ],
)
def test_other_spellings_of_a_command(words: list[str], advised: str) -> None:
    assert advised_of(words) == advised
    if "VALUE" not in advised:
        found = take(config_parser("trainer", ""), [advised])
        load(found.config, found.overrides)


def test_what_is_meant_is_taken() -> None:
    for words in (["demo", "train.steps=3"], ["train.steps=3"], ["configs/presets/demo.yaml", "run.name=--config"]):
        found = take(config_parser("trainer", ""), words)
        assert [w for w in (found.config, *found.overrides) if w] == words


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("change", ["model.dim=256", "optim.name=sgd", "run.seed=3", "model.dropout=0.5"])
def test_advice_of_a_folder_begun_with_another_config(change: str, stored: bool, tmp_path: Path) -> None:
    """A changed shape cannot be admitted while a checkpoint has the old one: loading would refuse it."""
    begun = load("demo", [f"run.dir={tmp_path}/run"])
    folder = RunFolder(Path(begun.run_dir))
    folder.root.mkdir()
    write_config(begun, folder)
    if stored:
        (folder.checkpoints / "step-00000003").mkdir(parents=True)
        (folder.checkpoints / "step-00000003" / "manifest.json").write_text("{}")
    with pytest.raises(UserError) as error:
        check_folder(load("demo", [f"run.dir={folder.root}", change]), folder)
    advice = re.search(r"run\.accept_changes=\S+", str(error.value))
    if stored and change.startswith(("model.dim", "optim.name")):
        assert advice is None
        assert "use another run.dir" in str(error.value)
        return
    assert advice is not None
    check_folder(load("demo", [f"run.dir={folder.root}", change, advice[0]]), folder)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_run_begun_with_another_default_is_told_how_to_keep_it(name: str, tmp_path: Path) -> None:
    """To admit a change that nobody made would change the run: it would lose its decay."""
    typed = [f"run.dir={tmp_path}", f"optim.name={name}"]
    folder = RunFolder(tmp_path)
    write_config(load("demo", [*typed, "optim.weight_decay=0.1"]), folder)  # the default of that time
    with pytest.raises(UserError) as error:
        check_folder(load("demo", typed), folder)
    (advised,) = re.findall(r"^(\S+) keeps what it was begun with; or use another run\.dir", str(error.value), re.M)
    assert load("demo", [*typed, advised]).optim.weight_decay == 0.1
    assert check_folder(load("demo", [*typed, advised]), folder) == []


def test_a_trial_cut_to_size_keeps_a_schedule_that_fits() -> None:
    for schedule in ("wsd", "cosine"):
        typed = ["optim.warmup_steps=1000", "optim.decay_steps=500", "train.steps=9000", f"optim.schedule={schedule}"]
        cut = cut_to_size(load("demo", typed), "x")
        check_rates(cut)
        assert (cut.train.steps, cut.optim.warmup_steps, cut.optim.decay_steps) == (5, 2, 3)
    check_rates(cut_to_size(load("demo", [*typed, "optim.schedule=wsd", "train.steps=0"]), "x"))
    check_rates(cut_to_size(load("demo", [*typed, "optim.schedule=wsd", "train.steps=1"]), "x"))
