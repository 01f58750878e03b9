"""`python -m slurm submit`: the request, what is refused before the queue, and what then runs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.errors import UserError
from configs.schema.slurm import SlurmSection
from slurm.minutes import minutes
from slurm.rehearsal.cluster import Cluster
from slurm.submit.array import overrides_of
from slurm.submit.limits import Partition, check, gpus_of, partition_of
from slurm.submit.request import _read_file, cluster_file
from tests.distributed import write_config
from tests.machine import patience
from tests.slurm.jobs import ROOT, call, environment, wait_for
from trainer.life.events import Events
from trainer.life.folder import RunFolder
from trainer.life.rows import read_json, read_rows

SMALL = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=2")


def submit(
    config: Path, *words: str, cluster: Cluster | None = None, home: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it as typed, with a cluster of the tests or without any."""
    env = environment(cluster) if cluster else {**os.environ, "PATH": str(Path(sys.executable).parent)}
    env["XDG_CONFIG_HOME"] = str(home or config.parent)
    command = [sys.executable, "-m", "slurm", "submit", str(config), *words]
    limit_s = patience(280.0)
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False)


def script(config: Path, *words: str, home: Path | None = None) -> str:
    done = submit(config, *words, "--dry-run", home=home)
    assert done.returncode == 0, done.stderr
    assert not (config.parent / "run").exists()
    return done.stdout


# ---- on a cluster ----------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_submitted_run_trains_from_its_snapshot(cluster: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    request = [*SMALL, "slurm.sbatch={export: NONE}", "slurm.setup=[export OMP_NUM_THREADS=1]"]  # as some sites do
    printed = submit(config, *request, "--dry-run", cluster=cluster)
    done = submit(config, *request, "--wait", cluster=cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[:4])
    assert told["folder"] == str(tmp_path / "run")
    assert told["job"].isdigit()
    assert f"python -m slurm stop {told['job']}" in told["stop"]
    assert "finished at step 6" in done.stdout
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == 6
    start = read_json(tmp_path / "run/attempts/000/start.json")
    assert (start["world_size"], start["hosts"]) == (4, ["node1", "node2"])
    (snapshot,) = (tmp_path / "run/slurm").glob("snapshot-*")
    assert start["command"][0] == str(snapshot / "trainer/__main__.py")
    assert start["environment"]["OMP_NUM_THREADS"] == "1"
    assert (tmp_path / f"run/slurm/{told['job']}_submission.sh").read_text() == printed.stdout
    assert not list((tmp_path / "run/slurm").glob("*_1_log.out"))  # one log for all nodes


@pytest.mark.full
def test_another_node_than_the_first_says_its_name(cluster: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    # A task knows its node by name. Here the second task gets a name that nobody knows.
    done = submit(config, *SMALL, "--wait", f"slurm.srun=[--task-prolog={_misnamed(tmp_path)}]", cluster=cluster)
    assert done.returncode in (1, 2), done.stdout + done.stderr  # srun may count the first node, which it killed
    assert "error: gone.invalid: the name of node gone.invalid does not resolve here" in done.stdout


def _misnamed(folder: Path) -> Path:
    prolog = folder / "prolog"
    prolog.write_text('#!/bin/sh\n[ "$SLURM_NODEID" = 0 ] || echo export SLURMD_NODENAME=gone.invalid\n')
    prolog.chmod(0o755)
    return prolog


@pytest.mark.full
def test_wait_returns_what_the_run_came_to(cluster: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path, start__from=str(tmp_path / "nothing"))
    done = submit(config, *SMALL, "--wait", "--no-check-data", cluster=cluster)  # only the nodes look
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: " in done.stdout


def test_a_second_submission_of_a_run_is_refused_while_the_first_lives(cluster: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    later = "slurm.sbatch={begin: now+1hour}"
    first = submit(config, *SMALL, later, cluster=cluster)
    assert first.returncode == 0, first.stderr
    number = first.stdout.split()[1]
    second = submit(config, *SMALL, later, cluster=cluster)
    assert (second.returncode, len(second.stderr.splitlines())) == (2, 1)
    assert f"job {number} has it" in second.stderr
    assert call(cluster, "squeue", "-h", "-o", "%i").split() == [number]
    call(cluster, "scancel", number)
    third = submit(config, *SMALL, later, cluster=cluster)
    assert third.returncode == 0, third.stderr
    call(cluster, "scancel", third.stdout.split()[1])


def test_a_request_that_the_cluster_cannot_meet_is_not_submitted(cluster: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    for words, told in (
        (("--partition=hihg",), "there is no partition 'hihg' here; did you mean high? (partitions: low, high)"),
        (("--gpus-per-node=5",), "5 GPUs per node: the nodes of partition low have at most 4"),
        (("--nodes=4",), "4 nodes: partition low has 3"),
        (("--constraint=h100",), "Invalid feature specification"),
        (("--nodelist=node9",), "Invalid node name"),
    ):
        done = submit(config, *SMALL, *words, cluster=cluster)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert told in done.stderr
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    done = submit(config, *SMALL, f"run.dir={tmp_path}/file/run", cluster=cluster)
    assert done.returncode == 2
    assert "run.dir: cannot write" in done.stderr
    assert call(cluster, "squeue", "-h") == ""


@pytest.mark.full
def test_an_array_is_one_job_of_several_runs(cluster: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    one_node = ("--nodes=1", "--gpus-per-node=2", "--cpus-per-task=2", "--wait")
    done = submit(config, *one_node, "--array=optim.lr=[1e-3,3e-4]", cluster=cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [tmp_path / f"run/optim.lr={lr}" for lr in ("1e-3", "3e-4")]
    number = done.stdout.split("_")[0]
    for task, run in enumerate(runs):
        assert read_json(run / "slurm/job.json")["job"] == f"{number}_{task}"
        assert read_json(run / "attempts/000/end.json")["reason"] == "finished"
    first, second = (read_rows(run / "metrics.jsonl")[-1]["loss"] for run in runs)
    assert first != second


@pytest.mark.full
@pytest.mark.parametrize("method", ["scontrol", "chain"])
def test_a_task_of_an_array_is_started_again_alone(method: str, cluster: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path, train__steps=2000, checkpoint__every_steps=0)
    words = ("--nodes=1", "--gpus-per-node=1", "--cpus-per-task=1", f"--requeue={method}")
    done = submit(config, *words, "--array=optim.lr=[1e-3,3e-4]", cluster=cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [RunFolder(tmp_path / f"run/optim.lr={lr}") for lr in ("1e-3", "3e-4")]
    numbers = [read_json(run.root / "slurm/job.json")["job"] for run in runs]
    for run in runs:
        wait_for("rows", lambda run=run: len(read_rows(run.metrics)) > 3)
    call(cluster, "scancel", "--signal=USR2", numbers[0])
    wait_for("the second life", lambda: (runs[0].attempts / "001/start.json").exists())
    for run in runs:
        run.stop.touch()
    wait_for("the end", lambda: not queue_of(cluster))
    assert [len(list(run.attempts.glob("*/end.json"))) for run in runs] == [2, 1]
    followed = read_json(runs[0].root / "slurm/job.json")["job"]
    assert followed.endswith("_0")
    assert (followed == numbers[0]) == (method == "scontrol")
    assert read_json(runs[1].root / "slurm/job.json")["job"] == numbers[1]


def queue_of(cluster: Cluster) -> list[str]:
    return call(cluster, "squeue", "-h", "-r", "-o", "%i").split()


def test_a_full_disk_is_told_and_nothing_submitted(cluster: Cluster, tmp_path: Path, may_mount: None) -> None:
    """The run folder has no room for the code that the job would run."""
    place = tmp_path / "run/slurm"
    place.mkdir(parents=True)
    config = write_config(tmp_path)
    command = [sys.executable, "-m", "slurm", "submit", str(config), *SMALL]
    script = f"mount -t tmpfs -o size=64k none {place} && exec {shlex.join(command)}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        **{"env": environment(cluster, XDG_CONFIG_HOME=str(tmp_path)), "cwd": ROOT, "timeout": 60},
        **{"capture_output": True, "text": True, "check": False},
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "No space left on device" in done.stderr
    assert call(cluster, "squeue", "-h") == ""


# ---- without one -----------------------------------------------------------------------------------------------------


def test_without_slurm_it_says_so_and_touches_nothing(tmp_path: Path) -> None:
    done = submit(write_config(tmp_path), *SMALL)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "no Slurm answers here" in done.stderr
    assert not (tmp_path / "run").exists()


def test_flags_lie_over_the_clusters_file_and_that_over_the_config(tmp_path: Path) -> None:
    site = tmp_path / "muster" / "cluster.yaml"
    site.parent.mkdir()
    site.write_text("account: site\nqos: site\npartition: site\nsetup: [module load site]\n")
    section = {"account": "config", "nodes": 2, "gpus_per_node": 4, "mem": "10G", "qos": "config"}
    text = script(write_config(tmp_path, slurm=section), "--qos=flag", "slurm.partition=typed")
    for line in ("--account=site", "--qos=flag", "--partition=typed", "--nodes=2", "--mem=10G", "--gpus-per-node=4"):
        assert f"#SBATCH {line}\n" in text
    assert "module load site\n" in text
    site.write_text("acount: site\n")
    done = submit(tmp_path / "config.yaml", "--dry-run")
    assert (done.returncode, done.stderr) == (2, f"error: {site}: there is no key 'acount'; did you mean account?\n")


def test_the_script_says_all_that_was_asked_for(tmp_path: Path) -> None:
    flags = ["--time=1-00:00:00", "--exclude=node7", "--reservation=r", "--dependency=afterok:1", "--mail-user=a@b.c"]
    flags += ["--mail-type=END", "--comment=two words", "--constraint=a&b", "--warning-s=300", "--container=img"]
    more = ["slurm.sbatch={gpu-bind: closest}", "slurm.srun=[--mpi=none]", "slurm.setup=[ulimit -n 9999]"]
    text = script(write_config(tmp_path), *SMALL, *flags, *more)
    for flag in flags:
        name, _, value = flag.partition("=")
        if name not in ("--warning-s", "--container"):
            assert f"{name}={value}" in text.replace("'", "")
    assert "#SBATCH --signal=USR2@300\n" in text
    assert "#SBATCH --gpu-bind=closest\n" in text
    assert "\nulimit -n 9999\n" in text
    (line,) = (line for line in text.splitlines() if line.startswith("srun "))
    for word in ("--kill-on-bad-exit=1", "--cpus-per-task=2", "--container-image=img", "--mpi=none"):
        assert f" {word} " in line
    assert " python -m slurm job " in line


def test_no_time_limit_but_the_sites_is_made_up(tmp_path: Path) -> None:
    assert "--time" not in script(write_config(tmp_path), *SMALL)


def test_the_runs_of_an_array(tmp_path: Path) -> None:
    listed = tmp_path / "runs.txt"
    listed.write_text("# two\noptim.lr=1e-3 run.seed=1\n\nrun.seed=2\n")
    of_lines, grid = overrides_of([str(listed)]), overrides_of(["optim.lr=[1e-3,0.1]", "optim.name=[adamw,sgd]"])
    assert [[own.typed for own in run] for run in of_lines] == [["optim.lr=1e-3", "run.seed=1"], ["run.seed=2"]]
    assert [[own.typed for own in run] for run in grid] == [
        [f"optim.lr={lr}", f"optim.name={name}"] for lr in ("1e-3", "0.1") for name in ("adamw", "sgd")
    ]
    text = script(write_config(tmp_path), *SMALL, "--array=run.seed=[1,2,3]")
    assert "#SBATCH --array=0-2%" in text
    assert text.count('/config-"$SLURM_ARRAY_TASK_ID".yaml') == 2


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("optim.lr=1e-3", "stands in brackets"),
        ("nothing.txt", "neither KEY=[A,B] nor a file"),
        ("slurm.nodes=[1,2]", "share what is asked of Slurm"),
        ("run.seed=[1,1]", "two runs would both be run.seed=1"),
        ("optim.rl=[1,2]", "unknown key optim.rl"),
    ],
)
def test_what_an_array_cannot_be(word: str, told: str, tmp_path: Path) -> None:
    done = submit(write_config(tmp_path), *SMALL, "--array", word, "--dry-run")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert told in done.stderr


def test_the_code_where_it_lies(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert "PYTHONSAFEPATH=1" in script(config, *SMALL)
    assert "PYTHONPATH" not in script(config, *SMALL, "--no-snapshot")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--nodes=2",), "how many GPUs has a node"),
        ((*SMALL, "parallel.replicate=3"), "is not the 4 rank(s)"),
        ((*SMALL, "--time=2h"), "time '2h'"),
        ((*SMALL, "--time=2", "--warning-s=200"), "so at once"),
        ((*SMALL, "--nodes=0"), "nodes: Input should be greater than or equal to 1"),
        ((*SMALL, "slurm.patition=x"), "patition"),
        ((*SMALL, "run.dir=/dev/shm/run"), "lies in this machine's memory (tmpfs): no node sees it"),
    ],
)
def test_a_mistake_is_told_before_anything_is_asked(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = submit(write_config(tmp_path), *words, "--dry-run")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert told in done.stderr


def test_the_warning_must_leave_time_for_a_save(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (tmp_path / "run").mkdir()
    Events(RunFolder(tmp_path / "run"), "node1", "rank00000").write("saved", seconds=150.0)
    done = submit(config, *SMALL, "--dry-run")
    assert done.returncode == 2
    assert "took 150 s" in done.stderr
    assert submit(config, *SMALL, "--dry-run", "--warning-s=300").returncode == 0


def test_a_config_with_a_request_is_the_same_run(tmp_path: Path) -> None:
    from configs.fingerprint import fingerprint
    from configs.load import load

    config = write_config(tmp_path)
    with_request = tmp_path / "other.yaml"
    with_request.write_text(config.read_text() + yaml.safe_dump({"slurm": {"nodes": 4}}))
    assert fingerprint(load(str(config), [])) == fingerprint(load(str(with_request), []))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30", 30), ("30:30", 30.5), ("12:00:00", 720), ("2-00", 2880), ("1-12:30", 2190), ("infinite", None)],
)
def test_time_limits_as_slurm_reads_them(text: str, expected: float | None) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["2h", "", "1:2:3:4", "-5", "a-1"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="write it as Slurm does"):
        minutes(text)


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [("gpu:4", 4), ("gpu:a100:8(S:0-1)", 8), ("(null)", 0), ("nvme:1,gpu:h100:4,gpu:l4:2", 6), ("gpu_mem:80", 0)],
)
def test_gpus_of_a_node(gres: str, gpus: int) -> None:
    assert gpus_of(gres) == gpus


def test_limits_of_a_partition() -> None:
    line = "PartitionName=a AllowGroups=ALL Default=YES MaxNodes=8 MaxTime=2-00:00:00 State=UP TotalNodes=16"
    found = partition_of(line, {"a": 8})
    assert found == Partition("a", True, True, 16, 8, 2880, 8)
    check(SlurmSection(nodes=8, gpus_per_node=8, time="2-00:00:00"), [found])
    for request, told in (
        (SlurmSection(nodes=9), "gives at most 8"),
        (SlurmSection(time="2-00:00:01"), "allows 2880 minutes"),
        (SlurmSection(time="infinite"), "allows 2880 minutes"),
    ):
        with pytest.raises(UserError, match=told):
            check(request, [found])
    wide = Partition("b", False, True, 16, None, None, 8)
    check(SlurmSection(nodes=9, partition="a,b"), [found, wide])  # one of the two is enough
    with pytest.raises(UserError, match="no default partition"):
        check(SlurmSection(), [wide])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("partition: [gpu\n", ":2: "),
        ("- gpu\n", "expected lines of `key: value`"),
        ("time: [30]\n", "time: Input should be a valid string"),
        ("nodes: 0\n", "nodes: Input should be greater"),
    ],
)
def test_mistakes_in_a_clusters_file_are_told_as_its_own(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    cluster_file().parent.mkdir()
    cluster_file().write_text(text)
    with pytest.raises(UserError, match=f"{cluster_file()}:") as raised:
        _read_file(cluster_file())
    assert told in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_times_need_no_quotes_in_a_clusters_file(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("time: 12:00:00\n")
    assert _read_file(tmp_path / "cluster.yaml") == {"time": "12:00:00"}
