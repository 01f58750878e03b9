"""The environment is checked before anything else, by every program in the same way."""

from __future__ import annotations

import ast
import contextlib
import io
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from tests.test_repository import PACKAGES, python_files
from trainer.host.environment import VARIABLES, FromLauncher, Job, Ranks, check

ROOT = Path(__file__).resolve().parents[2]
RANK_1 = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
LAUNCHER = FromLauncher(
    1.5, 7, "token", Path("/t/request"), Path("/t/error"), Path("/t/failures"), Path("/t/beats"), 2.5
)


def test_what_torchrun_says_is_read() -> None:
    assert Ranks.read({}) == Ranks(0, 1, 0, 1, None, False)
    assert Ranks.read({"MASTER_ADDR": "left", "MASTER_PORT": "1"}) == Ranks()  # job scripts export these for torchrun
    assert Ranks.read(RANK_1) == Ranks(1, 4, 1, 2, ("127.0.0.1", 29500), False)
    assert Ranks.read(RANK_1 | {"TORCHELASTIC_RUN_ID": "x"}).by_torchrun
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert Ranks.read(alone) == Ranks()
    assert not Ranks.read(RANK_1).one_node
    assert Ranks.read(RANK_1 | {"LOCAL_WORLD_SIZE": "4"}).one_node


@pytest.mark.parametrize(
    ("told", "local_rank", "local_size"),
    [
        ({}, 0, 1),  # a task of srun that sees only its own GPU
        ({"LOCAL_RANK": "1"}, 1, 2),
        ({"LOCAL_RANK": "3"}, 3, 4),
        ({"LOCAL_WORLD_SIZE": "2"}, 1, 2),
    ],
)
def test_torch_itself_asks_for_no_local_variables(told: dict[str, str], local_rank: int, local_size: int) -> None:
    """Wrappers of srun and mpirun, and DeepSpeed's launcher, set only what `init_method=env://` needs."""
    env = {name: value for name, value in RANK_1.items() if not name.startswith("LOCAL_")} | {"RANK": "3"} | told
    found = Ranks.read(env)
    assert (found.rank, found.size, found.local_rank, found.local_size) == (3, 4, local_rank, local_size)
    assert not found.one_node  # all ranks must give the same answer, and rank 0 cannot know this
    assert found.meeting == ("127.0.0.1", 29500)
    assert Ranks.read(env | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}) == Ranks()
    with pytest.raises(UserError, match="start with torchrun"):
        Ranks.read({name: value for name, value in env.items() if name != "MASTER_PORT"} | {"LOCAL_RANK": "0"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "x"}, "RANK='x' is no whole number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' is no whole number"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "1_0"}, "RANK='1_0'"),
        ({"RANK": "１"}, "RANK='１'"),
        ({"WORLD_SIZE": "9" * 5000}, "is no whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000' is no port"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT='0' is no port"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR='' is empty"),
        ({"RANK": "4"}, "RANK=4 and WORLD_SIZE=4 contradict each other"),
        ({"WORLD_SIZE": "0"}, "RANK=1 and WORLD_SIZE=0 contradict"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 and LOCAL_WORLD_SIZE=2 contradict"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5 and WORLD_SIZE=4 contradict"),
        ({"RANK": "0"}, "LOCAL_RANK=1 and RANK=0 contradict"),
    ],
)
def test_ranks_that_cannot_be_are_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        Ranks.read(RANK_1 | changes)
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("RANK", "RANK is set, but not WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE"),
        ("WORLD_SIZE", "WORLD_SIZE is set, but not RANK"),
        ("WORLD_SIZE RANK", "RANK, WORLD_SIZE are set, but not LOCAL_RANK, LOCAL_WORLD_SIZE"),
        ("RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE", "WORLD_SIZE=4 without MASTER_ADDR, MASTER_PORT"),
        ("RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR", "WORLD_SIZE=4 without MASTER_PORT"),
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RUN_ID is set, but not RANK"),
    ],
)
def test_some_of_torchruns_variables_alone_are_refused_and_the_advice_helps(given: str, words: str) -> None:
    environ = {name: (RANK_1 | {"TORCHELASTIC_RUN_ID": "x"})[name] for name in given.split()}
    with pytest.raises(UserError, match=words) as refused:
        Ranks.read(environ)
    advice = str(refused.value).rpartition("or unset ")[2].split()
    assert Ranks.read({name: value for name, value in environ.items() if name not in advice}) == Ranks()


def test_what_the_launcher_says_is_heard() -> None:
    environ = LAUNCHER.environment()
    assert len(environ) == 8
    assert set(environ) <= set(VARIABLES)
    assert FromLauncher.read(environ) == LAUNCHER
    assert FromLauncher.read({}) is None


@pytest.mark.parametrize("missing", LAUNCHER.environment())
def test_some_of_a_launchers_variables_alone_are_refused_and_the_advice_helps(missing: str) -> None:
    environ = {name: value for name, value in LAUNCHER.environment().items() if name != missing}
    with pytest.raises(UserError, match=f"left over from a launcher .*{missing} is missing") as refused:
        FromLauncher.read(environ)
    advice = str(refused.value).rpartition("unset ")[2].split()
    assert FromLauncher.read({name: value for name, value in environ.items() if name not in advice}) is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("OMP_NUM_THREADS", "many", "OMP_NUM_THREADS='many' is no whole number"),
        ("OMP_NUM_THREADS", "0", "is no number of threads"),
        ("OMP_NUM_THREADS", "4,", "is no whole number"),
        ("MUSTER_PRETEND_GPUS", "two", "MUSTER_PRETEND_GPUS='two'"),
        ("MUSTER_LAUNCHED", "nan", "MUSTER_LAUNCHED='nan' is no time"),
        ("MUSTER_LAUNCHED", "soon", "MUSTER_LAUNCHED='soon'"),
        ("MUSTER_HEARTBEATS", "here", "is no absolute path"),
        ("MUSTER_LEASE", " ", "is empty"),
        ("SLURM_JOB_ID", "7_1", "SLURM_JOB_ID='7_1'"),
        ("SLURM_RESTART_COUNT", "-1", "SLURM_RESTART_COUNT='-1'"),
        ("SLURMD_NODENAME", "../node", "SLURMD_NODENAME='../node' is no name of a node"),
    ],
)
def test_one_that_cannot_be_used_is_refused_by_name(name: str, value: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        check({name: value})
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_what_may_stand_there_does() -> None:
    check({"MASTER_PORT": "tcp://10.0.0.1:29500", "MASTER_ADDR": "", "RANK": "x"})  # `launch run` never reads them
    check({**LAUNCHER.environment(), "OMP_NUM_THREADS": "4,2", "CUDA_VISIBLE_DEVICES": "", "TERM": ""})
    assert VARIABLES["OMP_NUM_THREADS"].read({"OMP_NUM_THREADS": "4,2"}) == 4
    for nothing in ("", " "):  # export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK without --cpus-per-task
        assert VARIABLES["OMP_NUM_THREADS"].read({"OMP_NUM_THREADS": nothing}) is None
    assert Job.read({}) == Job(None, "0", None)
    assert Job.read({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURM_STEP_ID": "0"}) == Job("7", "2", "0")


def trainer(*arguments: str) -> tuple[int, str]:
    """(exit code, standard error) of `python -m trainer` in this process, with its environment."""
    from trainer.__main__ import main

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main(list(arguments))
    return code, errors.getvalue()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_whatever_the_rank_says_it_itself_unless_there_is_a_rank_0(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`RANK=1 python -m trainer` by hand once ended with 2 and without a word."""
    for name, value in (RANK_1 | {"RANK": rank, "LOCAL_RANK": rank}).items():
        monkeypatch.setenv(name, value)
    code, said = trainer("demo", "train.step=3")
    assert (code, said.count("error: ")) == (2, 1)
    monkeypatch.setattr("trainer.__main__.die_with_parent", lambda parent: True)  # as if launched
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    code, said = trainer("demo", "train.step=3")
    assert (code, said.count("error: ")) == (2, int(rank == "0"))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")  # on another node: what is wrong there may be right where rank 0 is
    code, said = trainer("demo", "train.step=3")
    assert (code, said.count("error: ")) == (2, 1)
    monkeypatch.delenv("WORLD_SIZE")
    code, said = trainer("demo")
    assert (code, len(said.splitlines())) == (2, 1)
    assert "are set, but not WORLD_SIZE" in said


@pytest.mark.parametrize("agreed", [False, True])
@pytest.mark.parametrize(("rank", "local_rank"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_a_mistake_is_said_once_and_every_nodes_launcher_hears_of_it(
    rank: int, local_rank: int, agreed: bool, tmp_path: Path
) -> None:
    from trainer.__main__ import user_error

    error, errors = UserError("wrong"), io.StringIO()
    error.agreed = agreed
    launcher = replace(LAUNCHER, user_error=tmp_path / "error")
    with contextlib.redirect_stderr(errors):
        assert user_error(error, Ranks(rank, 4, local_rank, 2, None, True), launcher) == 0
    says = rank == 0 if agreed else local_rank == 0
    assert errors.getvalue() == "error: wrong\n" * says
    assert launcher.user_error.exists() == (local_rank == 0)


def test_a_dead_launchers_variables_are_refused_and_its_files_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHER.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("trainer.__main__.die_with_parent", lambda parent: parent != 7)
    code, said = trainer("demo")
    assert code == 2
    assert len(said.splitlines()) == 1
    assert "left over from a launcher that did not start this process (MUSTER_PARENT=7" in said


# ---- one list -------------------------------------------------------------------------------------------------------


def reads_of_the_environment(source: str) -> list[int]:
    """Lines that look up a variable by its name: `os.environ["X"]`, `os.environ.get("X")`, `"X" in os.environ`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="environ"), ctx=ast.Load()):
                found.append(node.lineno)
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ"), attr="get"), args=[name, *_]):
                if not isinstance(name, ast.Name):  # else a user's own variable, named in a config
                    found.append(node.lineno)
            case ast.Compare(comparators=[ast.Attribute(attr="environ")]):
                found.append(node.lineno)
            case ast.Attribute(attr="getenv"):
                found.append(node.lineno)
    return found


def test_nobody_reads_a_variable_past_the_list() -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in python_files()
        if path.relative_to(ROOT).parts[0] in PACKAGES and path.relative_to(ROOT).parts[0] != "benchmarks"
        if (lines := reads_of_the_environment(path.read_text("utf-8")))
    }
    assert found == {}


def test_a_read_past_the_list_is_found() -> None:
    for line in ('os.environ["A"]', 'os.environ.get("A", 1)', '"A" in os.environ', 'os.getenv("A")'):
        assert reads_of_the_environment(f"import os\nx = {line}\n") == [2], line
    for line in ('os.environ["A"] = "1"', 'os.environ.setdefault("A", "1")', "run(env={**os.environ})"):
        assert reads_of_the_environment(f"import os\n{line}\n") == [], line
