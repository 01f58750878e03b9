"""The number of threads depends on what the allocation allows and on what is idle."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.config import Config
from tests.distributed import run_ranks, tiny
from trainer.host import cgroups, memory, processors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 16 processors whose kernel files are in a folder."""
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    return tmp_path


CGROUP, CPU_MAX, STAT = "proc/self/cgroup", "sys/fs/cgroup/cpu.max", "proc/stat"


def put(machine: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = machine / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_without_limits_the_affinity_counts(machine: Path) -> None:
    assert processors.allowed() == 16
    put(machine, {CGROUP: "0::/\n", CPU_MAX: "max 100000\n"})
    assert processors.allowed() == 16


@pytest.mark.parametrize(
    ("limit", "count"), [("400000 100000", 4), ("150000 100000", 1), ("20000 100000", 1), ("3200000 100000", 16)]
)
def test_a_quota_of_version_2(limit: str, count: int, machine: Path) -> None:
    put(machine, {CGROUP: "0::/job/step\n"})
    group = machine / "sys/fs/cgroup/job"
    (group / "step").mkdir(parents=True)
    (group / "step/cpu.max").write_text("max 100000\n")
    (group / "cpu.max").write_text(f"{limit}\n")  # of the group around it
    assert processors.allowed() == count


@pytest.mark.parametrize(
    ("groups", "limits"),
    [
        ("0::/job/step\n", {"job/memory.max": "max\n", "job/step/memory.max": "3000\n"}),
        ("0::/job/step\n", {"job/memory.max": "3000\n", "job/step/memory.max": "max\n"}),  # of the group around it
        ("9:memory:/job\n", {"memory/job/memory.limit_in_bytes": "3000\n"}),
        ("9:memory:/job\n", {"memory/job/memory.limit_in_bytes": f"{2**63 - 4096}\n", "memory.max": "1\n"}),
        ("5:cpu:/job\n", {"cpu/job/memory.max": "1\n"}),
    ],
    ids=["version 2", "around it", "version 1", "no limit", "another controller"],
)
def test_memory_is_that_of_the_allocation(groups: str, limits: dict[str, str], machine: Path) -> None:
    put(machine, {CGROUP: groups, **{f"sys/fs/cgroup/{name}": text for name, text in limits.items()}})
    limited = any(text == "3000\n" for text in limits.values())
    assert (memory._machine_bytes() == 3000) == limited
    assert memory._machine_bytes() >= 3000


def test_a_container_that_sees_its_own_group_as_the_outermost(machine: Path) -> None:
    put(machine, {CGROUP: "0::/docker/0123abc\n", CPU_MAX: "200000 100000\n"})
    assert processors.allowed() == 2


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_a_quota_of_version_1(mount: str, machine: Path) -> None:
    put(machine, {CGROUP: f"3:memory:/a\n2:{mount}:/kube/pod\n0::/\n"})
    group = machine / "sys/fs/cgroup" / mount / "kube/pod"
    group.mkdir(parents=True)
    (group / "cpu.cfs_period_us").write_text("50000\n")
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    assert processors.allowed() == 16
    (group / "cpu.cfs_quota_us").write_text("150000\n")
    assert processors.allowed() == 3


def stat(busy: list[int], ticks: int) -> str:
    """/proc/stat after `ticks`, in which these processors were busy and the others not."""
    rows = [f"cpu{n} {ticks if n in busy else 0} 0 0 {0 if n in busy else ticks} 0 0 0 0 0 0" for n in range(16)]
    return "\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *rows, "ctxt 1"]) + "\n"


@pytest.mark.parametrize(
    ("busy", "processes", "each"),
    [([], 1, 16), ([], 2, 8), ([], 5, 3), ([], 32, 1), ([0], 1, 15), (list(range(12)), 2, 2), (list(range(16)), 1, 1)],
)
def test_threads_are_for_idle_processors(
    busy: list[int], processes: int, each: int, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(machine, {STAT: stat(busy, 0)})
    monkeypatch.setattr(processors.time, "sleep", lambda seconds: put(machine, {STAT: stat(busy, 20)}))
    found = processors.threads(processes)
    assert found.each == each
    assert str(found).endswith(f"16 processors may be used, {16 - len(busy):.1f} idle")


def test_more_idle_than_allowed_gives_what_is_allowed(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(machine, {STAT: stat([], 0), CGROUP: "0::/\n", CPU_MAX: "300000 100000\n"})
    monkeypatch.setattr(processors.time, "sleep", lambda seconds: put(machine, {STAT: stat([], 20)}))
    assert str(processors.threads(1)) == "threads   3 CPU threads a process: 3 processors may be used, 3.0 idle"


def test_a_deterministic_run_gets_as_many_whatever_else_runs(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of threads sums in another order."""
    monkeypatch.setattr(processors.time, "sleep", lambda seconds: pytest.fail("it looks what is idle"))
    put(machine, {CGROUP: "0::/\n", CPU_MAX: "800000 100000\n"})
    assert [processors.threads(n, deterministic=True).each for n in (1, 2, 3, 8, 16)] == [8, 4, 2, 1, 1]
    assert str(processors.threads(2, True)) == "threads   4 CPU threads a process: 8 processors may be used"


def _a_run(config: dict[str, Any], threads: int) -> str:
    """The printed text of a run that computes with this many threads."""
    from trainer.life.stop import StopWish
    from trainer.start import start

    os.environ.pop("OMP_NUM_THREADS")
    processors.threads = lambda processes, deterministic=False: processors.Threads(threads, 8, 3.0)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert start(Config.model_validate(config), StopWish()) == 0
    return said.getvalue()


def test_a_run_says_when_it_goes_on_with_another_number_of_threads(tmp_path: Path) -> None:
    said = {}
    for steps, threads in ((2, 1), (3, 1), (4, 2)):
        (said[steps],) = run_ranks(1, _a_run, tiny(tmp_path, train__steps=steps), threads)
    line = "threads   2 a process, 1 before: sums on the CPU may differ in their last bits\n"
    assert [text.count(line) for text in said.values()] == [0, 0, 1]


def test_on_one_allowed_core_or_busy_ones_there_is_one_thread() -> None:
    """The real machine: all its processors are kept busy, then only one is allowed."""
    usable = os.sched_getaffinity(0)
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    busy = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in usable]
    try:
        for process in busy:
            assert process.stdout is not None
            process.stdout.read(1)
        assert processors.threads(1).each == 1
    finally:
        for process in busy:
            process.kill()
            process.communicate()
    only = f"import os; os.sched_setaffinity(0, [{min(usable)}])"
    code = f"{only}; from trainer.host.processors import allowed; print(allowed())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "1\n"


def _a_rank(config: dict[str, Any], user: str | None) -> tuple[int, str]:
    """(number of threads of a rank, its printed text), where the processors would give it three."""
    import torch

    from trainer.ranks import world

    os.environ.pop("OMP_NUM_THREADS")
    if user is not None:
        os.environ["OMP_NUM_THREADS"] = user
    processors.threads = lambda processes, deterministic: processors.Threads(3, 8, 3.0)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        world.start(Config.model_validate(config))
    return torch.get_num_threads(), said.getvalue()


def test_a_rank_takes_what_is_chosen_and_says_so_unless_a_person_has_chosen(tmp_path: Path) -> None:
    line = "threads   3 CPU threads a process: 8 processors may be used, 3.0 idle\n"
    assert run_ranks(1, _a_rank, tiny(tmp_path), None) == [(3, line)]
    assert run_ranks(1, _a_rank, tiny(tmp_path), "1") == [(1, "")]
