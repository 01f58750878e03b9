"""Every verb in the help exists, and explains itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import launch.__main__
import muster.command
import slurm.__main__

MAINS = {"python -m launch": launch.__main__, "python -m slurm": slurm.__main__, "muster": muster.command}
VERBS = [(command, verb) for command, main in MAINS.items() for verb in main.VERBS]


@pytest.fixture(autouse=True)
def _as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.host.arguments._as_muster", False)


@pytest.mark.parametrize(("command", "verb"), VERBS)
def test_every_verb_explains_itself(command: str, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    main: Callable[[list[str]], int] = MAINS[command].main
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: {command} {verb} " in capsys.readouterr().out


@pytest.mark.parametrize("command", MAINS)
@pytest.mark.parametrize("words", [["bake"], [], ["watch", "--bake"]])
def test_a_wrong_word_is_one_line(words: list[str], command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert MAINS[command].main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert len(told.err.splitlines()) == 1
    assert f"{command} " in told.err  # the command that prints help


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--train.steps", "10"], "settings are written without dashes: train.steps=10"),
        (["demo", "--train.steps=10"], "settings are written without dashes: train.steps=10"),
        (["--config", "mine.yaml"], "the config is written alone: mine.yaml"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "run", "submit"])
def test_words_of_other_programs(verb: str, words: list[str], advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert muster.command.main([verb, *words]) == 2
    assert capsys.readouterr().err == f"error: {words[-2] if '=' not in words[-1] else words[-1]}: {advice}\n"


def test_advice_names_the_command_that_was_typed() -> None:
    from trainer.host.arguments import be_muster, typed

    assert typed("slurm stop", "my run") == "python -m slurm stop 'my run'"
    assert typed("trainer", "CONFIG") == "python -m trainer CONFIG"
    be_muster()
    assert typed("slurm stop", "my run") == "muster stop 'my run'"
    assert typed("trainer", "CONFIG") == "muster train CONFIG"
    assert typed("launch") == "muster"
