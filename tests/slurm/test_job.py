"""A run on several nodes of the rehearsal cluster."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs.errors import UserError
from slurm.job.job import nodes_of_step
from slurm.rehearsal.cluster import Cluster
from tests.distributed import tiny, train, write_config
from tests.slurm.jobs import ROOT, call, submit, wait_for_end
from trainer.life.rows import read_json, read_rows

SCRIPT = str(ROOT / "slurm/examples/several-nodes.sbatch")
SMALL = ("--gpus-per-node=2", "--cpus-per-task=2")  # the script asks for 8 and 64


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_rows(folder / "run/metrics.jsonl")]


@pytest.mark.full
def test_two_nodes_learn_what_one_does(cluster: Cluster, tmp_path: Path) -> None:
    far, near = tmp_path / "far", tmp_path / "near"
    far.mkdir()
    near.mkdir()
    output = far / "job.txt"
    job = submit(cluster, *SMALL, f"--output={output}", SCRIPT, str(write_config(far)))
    assert wait_for_end(cluster, job, output) == "COMPLETED", output.read_text()
    start = read_json(far / "run/attempts/000/start.json")
    assert (start["world_size"], start["hosts"]) == (4, ["node1", "node2"])
    assert "rank 0 of 4 on node1" in output.read_text()
    assert not (far / "run/LEASE").exists()
    assert train(tiny(near), size=4) == [0] * 4
    assert losses(far) == losses(near)
    assert len(losses(far)) == 6


def test_a_mistake_ends_all_nodes_with_one_line(cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "job.txt"
    config = write_config(tmp_path, start__from=str(tmp_path / "nothing"))
    job = submit(cluster, *SMALL, f"--output={output}", SCRIPT, str(config))
    assert wait_for_end(cluster, job, output) == "FAILED"
    assert "ExitCode=2:0" in call(cluster, "scontrol", "show", "job", job), output.read_text()
    assert len(re.findall(r"^error: ", output.read_text(), re.M)) == 1, output.read_text()
    assert not (tmp_path / "run").exists()


# ---- without a cluster -----------------------------------------------------------------------------------------------

STEP = {
    "SLURM_JOB_ID": "55343278",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
}


def test_nodes_meet_at_the_first_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.job.job._first_host", lambda node_list: {"node[1-2]": "node1"}[node_list])
    nodes = nodes_of_step(STEP)
    assert (nodes.count, nodes.index, nodes.first, nodes.port) == (2, 1, "node1", 23278)
    assert not nodes.is_first
    assert nodes.start != nodes_of_step(STEP | {"SLURM_RESTART_COUNT": "1"}).start


@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NODEID"])
def test_outside_a_job_step_it_says_how_to_run(missing: str) -> None:
    with pytest.raises(UserError, match="srun --ntasks-per-node=1"):
        nodes_of_step({key: value for key, value in STEP.items() if key != missing})


def test_two_tasks_on_a_node_are_refused() -> None:
    with pytest.raises(UserError, match="4 tasks on 2 node"):
        nodes_of_step(STEP | {"SLURM_STEP_NUM_TASKS": "4"})


def test_a_name_that_does_not_resolve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.run.node import Nodes
    from slurm.job.job import _find_names

    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    with pytest.raises(UserError, match="localhost: the name of node gone"):
        _find_names(Nodes(2, 1, "gone.invalid", 20000, "1"))
    _find_names(Nodes(2, 1, "localhost", 20000, "1"))
