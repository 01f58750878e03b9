"""Every verb that help lists is there, and explains itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import launch.__main__
import slurm.__main__

MAINS = {"launch": launch.__main__, "slurm": slurm.__main__}
VERBS = [(room, verb) for room, main in MAINS.items() for verb in main.VERBS]


@pytest.mark.parametrize(("room", "verb"), VERBS)
def test_every_verb_explains_itself(room: str, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    main: Callable[[list[str]], int] = MAINS[room].main
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"python -m {room} {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("room", MAINS)
def test_an_unknown_verb_is_refused(room: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert MAINS[room].main(["bake"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1
    assert "bake" in told
