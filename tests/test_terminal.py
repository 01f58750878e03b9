"""How our programs print and end: whatever standard output is, at most one line and no traceback."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.look.text import table
from trainer.host import terminal
from trainer.host.console import Console

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("configs", "models", "trainer", "launch", "slurm", "muster")
Main = Callable[[list[str]], int]


def ended(main: Main, out: int | None, errors: Path, encoding: str = "utf-8") -> tuple[int, str]:
    """(exit code, standard error) of a program in its own process, with `out` as its output; None: closed."""
    child = os.fork()
    if child == 0:
        terminal._Stream.output_unheard = False  # whatever an earlier test ran in this process
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        if out is None:
            os.close(1)
        else:
            os.dup2(out, 1)
        sys.stdout = open(1, "w", encoding=encoding, closefd=False) if out is not None else None  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["program"]
        terminal.enter(main)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), errors.read_text()


def prints(arguments: list[str]) -> int:
    terminal.say("one line")
    terminal.say("x" * 100_000)
    return 0


def prints_at_the_end(arguments: list[str]) -> int:
    sys.stdout.write("one line")
    return 0


def goes_on(arguments: list[str]) -> int:
    terminal.go_on_unheard()
    console = Console(rank=0)
    console.say("step 1")
    console.live("step 2")
    sys.stdout.write("from a library")
    return 3


def without_reader() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("main", [prints, prints_at_the_end])
def test_a_command_whose_output_is_lost_says_one_line(main: Main, tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    assert ended(main, full, tmp_path / "err") == (1, "error: standard output: No space left on device\n")
    assert ended(main, None, tmp_path / "err") == (1, "error: standard output: it is closed\n")
    assert ended(main, without_reader(), tmp_path / "err") == (128 + signal.SIGPIPE, "")


def test_a_run_whose_output_is_lost_goes_on(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    told = "standard output: {}; the run goes on, and its log has every line\n"
    assert ended(goes_on, full, tmp_path / "err") == (3, told.format("No space left on device"))
    assert ended(goes_on, None, tmp_path / "err") == (3, told.format("it is closed"))
    assert ended(goes_on, without_reader(), tmp_path / "err") == (3, "")


def test_what_an_encoding_has_no_sign_for_is_shown(tmp_path: Path) -> None:
    def main(arguments: list[str]) -> int:
        terminal.say("ä ✓ \udcff")
        print("a library prints ä \udcff")
        return 0

    for encoding, first in (("ascii", r"\xe4 \u2713 \xff"), ("utf-8", r"ä ✓ \xff"), ("latin-1", r"ä \u2713 \xff")):
        told = tmp_path / encoding
        out = os.open(told, os.O_WRONLY | os.O_CREAT)
        assert ended(main, out, tmp_path / "err", encoding) == (0, "")
        assert told.read_text(encoding).splitlines()[0] == first


def test_the_next_file_does_not_get_what_is_printed(tmp_path: Path) -> None:
    def main(arguments: list[str]) -> int:
        terminal.go_on_unheard()
        with open(tmp_path / "file", "w") as file:
            terminal.say("for nobody")
            file.write("content")
        return 0

    assert ended(main, None, tmp_path / "err")[0] == 0
    assert (tmp_path / "file").read_text() == "content"


def test_a_pipe_that_does_not_wait_gets_everything(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    reader = subprocess.Popen(["sh", "-c", f"sleep 0.2; wc -c > {tmp_path}/count"], stdin=reading)
    assert ended(prints, writing, tmp_path / "err") == (0, "")
    os.close(writing)
    assert reader.wait(30) == 0
    assert int((tmp_path / "count").read_text()) == 100_010


def test_ctrl_c_and_help_end_without_a_traceback(tmp_path: Path) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    def leaves(arguments: list[str]) -> int:
        raise SystemExit(0)

    nowhere = os.open(os.devnull, os.O_WRONLY)
    assert ended(interrupted, nowhere, tmp_path / "err") == (130, "\nstopped\n")
    assert ended(leaves, nowhere, tmp_path / "err") == (0, "")


# ---- names and values that come from files --------------------------------------------------------------------------

HOSTILE = "run\x1b]0;owned[red]\x9b2J\u202e\n:tada:\udcff"
SHOWN = r"run\x1b]0;owned[red]\x9b2J\u202e"


def test_no_door_lets_a_name_give_orders(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from rich.text import Text

    from launch.look.screen import show_once

    console = Console(rank=0)
    console.open_log(tmp_path / "log")
    console.say(HOSTILE)
    terminal.say(HOSTILE)
    terminal.say("\n".join(table(("a", "b"), [(HOSTILE, 1)])))
    show_once(Text(HOSTILE))
    told = capfd.readouterr().out + (tmp_path / "log").read_text()
    assert told.count(SHOWN) == 5
    assert told.count(r":tada:\xff") == 5
    assert told.count(SHOWN + r"\n:tada:") == 1  # a cell stays one line
    assert all(c.isprintable() or c == "\n" for c in told)


def test_columns_are_as_wide_as_what_is_shown() -> None:
    header, row = table(("a", "b"), [(HOSTILE, 1)])
    assert (row + header).isprintable()
    assert header.index("b") == row.index(" 1") + 1


def test_a_table_of_rich_shows_markup(capfd: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    from launch.look.screen import show_once

    shown = Table("node", box=None)
    shown.add_row("[bold]gpu[/] :tada:")
    show_once(shown)
    assert "[bold]gpu[/] :tada:" in capfd.readouterr().out


DOORS = {"trainer/host/terminal.py", "trainer/host/console.py", "configs/errors.py", "trainer/host/shadow.py"}
WRITES = {  # output that is not for a person, or that makes a live line
    "launch/checkpoint/text.py": ["sys.stderr.write(text)"],
    "slurm/look/logs.py": ["sys.stdout.buffer.write(chunk)"],
    "slurm/submit/submit.py": ["sys.stdout.write(new.decode(errors='replace'))"],
    "configs/reference.py": ["print(f'wrote {path.relative_to(ROOT)}')"],
}


def printing(source: str) -> list[str]:
    """Calls of `print`, and of `write` on a standard stream."""
    called = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    found = [(ast.unparse(node.func), ast.unparse(node)) for node in called]
    return [
        call for name, call in found if name == "print" or re.fullmatch(r"sys\.std(out|err)\..*write(lines)?", name)
    ]


def test_nothing_is_printed_past_the_doors() -> None:
    """`say`, `tell`, `Console` and `show` escape what they print. All other code that prints must be listed here."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): printing(path.read_text("utf-8")) for path in paths}
    assert {name: calls for name, calls in found.items() if calls and name not in DOORS} == WRITES


@pytest.mark.parametrize("package", PACKAGES)
def test_every_program_ends_alike(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        last = ast.unparse(ast.parse(path.read_text("utf-8")).body[-1:])
        if last.startswith("if __name__ ==") and path.name not in {"stepd.py", "reference.py"}:
            program = "script()" if package == "muster" else "enter(main)"
            assert last == f"if __name__ == '__main__':\n    {program}", path


def test_a_real_command_whose_reader_has_left() -> None:
    """PYTHONUNBUFFERED writes at once. `head` has often left by then."""
    command, env = [sys.executable, "-m", "trainer", "demo", "--print-config"], {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdout=without_reader(), stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
