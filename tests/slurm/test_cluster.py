"""The rehearsal cluster is a real Slurm. Its nodes differ, can crash, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from configs.errors import UserError
from slurm.rehearsal import cluster as clusters
from slurm.rehearsal import net as cluster_net
from slurm.rehearsal.cluster import Cluster
from slurm.rehearsal.command import tell
from slurm.rehearsal.config import MARK, Home, Settings
from tests.distributed import write_config
from tests.slurm.jobs import ROOT, call, job_state, submit, wait_for, wait_for_end
from trainer.life.rows import read_json


def cluster_command(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slurm", "cluster", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def marked(home: Home) -> list[psutil.Process]:
    """Every living process of a cluster and of its jobs."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(home.root) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_each_node_has_its_name_and_sees_the_others(cluster: Cluster) -> None:
    script = "echo $SLURMD_NODENAME $(hostname) $(getent hosts node1 node2 | awk '{print $1}' | paste -sd,)"
    told = sorted(line.split() for line in call(cluster, "srun", "-N2", "bash", "-c", script).splitlines())
    assert [node for node, _, _ in told] == ["node1", "node2"]
    addresses = [cluster.settings.address(number) for number in (1, 2)]
    for node, host, seen in told:
        assert host == (node if cluster.settings.isolated else os.uname().nodename)
        assert seen == ",".join(addresses)
    assert len(set(addresses)) == (2 if cluster.settings.isolated else 1)


@pytest.mark.full
def test_a_job_trains_a_cpu_rank_per_pretended_gpu(cluster: Cluster, tmp_path: Path) -> None:
    config, output = write_config(tmp_path), tmp_path / "job.txt"
    line = f"{sys.executable} -m launch run {config} train.steps=4"
    job = submit(cluster, "--gpus-per-node=2", f"--output={output}", f"--wrap={line}")
    assert wait_for_end(cluster, job, output) == "COMPLETED", output.read_text()
    start = read_json(tmp_path / "run/attempts/000/start.json")
    assert start["world_size"] == 2
    assert start["hosts"] == ["node1"]
    assert start["environment"]["CUDA_VISIBLE_DEVICES"] == ""  # no job trains on a GPU that Slurm did not give it
    assert read_json(tmp_path / "run/attempts/000/end.json")["reason"] == "finished"


@pytest.mark.full
def test_the_script_for_one_node_runs_as_it_stands(cluster: Cluster, tmp_path: Path) -> None:
    config, output = write_config(tmp_path), tmp_path / "job.txt"
    script = str(ROOT / "slurm/examples/one-node.sbatch")
    smaller = ["--gpus-per-node=2", "--cpus-per-task=2", f"--output={output}"]
    job = submit(cluster, *smaller, script, str(config), "train.steps=4")
    assert wait_for_end(cluster, job, output) == "COMPLETED", output.read_text()
    assert read_json(tmp_path / "run/attempts/000/end.json")["reason"] == "finished"
    assert read_json(tmp_path / "run/attempts/000/start.json")["world_size"] == 2


@pytest.mark.full
def test_a_requeued_job_runs_again_and_both_lives_are_on_record(cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "job.txt"
    script = 'echo "life ${SLURM_RESTART_COUNT:-0}"; [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || sleep 300'
    job = submit(cluster, "--requeue", "--open-mode=append", f"--output={output}", f"--wrap={script}")
    wait_for("first life", lambda: output.exists() and "life 0" in output.read_text())
    call(cluster, "scontrol", "requeue", job)
    assert wait_for_end(cluster, job, output) == "COMPLETED"
    assert [line for line in output.read_text().splitlines() if line.startswith("life")] == ["life 0", "life 1"]
    if cluster.settings.accounting:
        lives = lambda: call(cluster, "sacct", "-D", "-X", "-n", "-j", job, "-o", "State").split()  # noqa: E731
        wait_for("both lives in sacct", lambda: lives() == ["REQUEUED", "COMPLETED"])


@pytest.mark.full
def test_a_crashed_node_is_noticed_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, "-w", "node2", "--no-requeue", f"--output={tmp_path}/job.txt", "--wrap=sleep 300")
    wait_for("running job", lambda: job_state(cluster, job) == "RUNNING")
    cluster.kill_node(2)
    wait_for("news of the crash", lambda: cluster.states()["node2"].startswith("down"))
    assert wait_for_end(cluster, job, tmp_path / "job.txt") == "NODE_FAIL"
    assert tell(cluster) == 1
    cluster.up()
    assert sorted(cluster.ready_nodes()) == ["node1", "node2", "node3"]


@pytest.mark.full
def test_a_dead_daemon_is_brought_back(cluster: Cluster) -> None:
    controller = cluster.alive("slurmctld")
    assert controller is not None
    controller.send_signal(signal.SIGKILL)
    wait_for("death of the controller", lambda: cluster.alive("slurmctld") is None)
    assert cluster_command("status", "--dir", str(cluster.home.root)).returncode == 1
    again = cluster_command("up", "--dir", str(cluster.home.root))
    assert again.returncode == 0, again.stderr
    assert cluster_command("status", "--dir", str(cluster.home.root)).returncode == 0


@pytest.mark.parametrize("plain", [False, pytest.param(True, marks=pytest.mark.full)], ids=["namespaces", "plain"])
def test_nothing_is_left_behind(cluster: Cluster, plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second cluster beside the first, taken down while it runs a job."""
    if not plain and not cluster.settings.isolated:
        plain = True
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    monkeypatch.setattr(cluster_net, "_HOSTS", hosts)
    home = Home(Path(tempfile.mkdtemp(prefix="muster-second-")))  # tmp_path can be too long for a socket
    second = clusters.start(home, nodes=1, gpus=1, plain=plain)
    try:
        settings = second.settings
        assert settings.slot != cluster.settings.slot
        assert ("node1" in hosts.read_text()) == plain
        job = submit(second, f"--output={tmp_path}/job.txt", "--wrap=sleep 300 & exec sleep 300")
        wait_for("the job's processes", lambda: len([p for p in marked(second.home) if p.name() == "sleep"]) == 2)
        assert job_state(second, job) == "RUNNING"
    finally:
        second.down()
    assert marked(second.home) == []
    assert not second.home.root.exists()
    assert hosts.read_text() == "127.0.0.1 localhost\n"
    assert not Path(f"/sys/class/net/{settings.bridge}").exists()
    assert not Path(f"/sys/class/net/{settings.link(1)}").exists()
    assert not Path(f"/run/netns/{settings.namespace(1)}").exists()
    assert cluster.ready_nodes() == ["node1", "node2", "node3"]


@pytest.mark.full
def test_without_a_database_it_comes_up_without_accounting(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_installer(tmp_path, monkeypatch)
    home = Home(Path(tempfile.mkdtemp(prefix="muster-third-")))
    third = clusters.start(home, nodes=1, gpus=0, plain=not cluster.settings.isolated)
    try:
        job = submit(third, f"--output={tmp_path}/job.txt", "--wrap=hostname")
        assert wait_for_end(third, job, tmp_path / "job.txt") == "COMPLETED"
        assert tell(third) == 0
        found = clusters.find(home)
        assert found is not None
        assert not found.settings.accounting
        found.up()  # does not try accounting again
    finally:
        third.down()
    assert "no accounting (sacct): mariadb-install-db: FATAL ERROR: Could not find " in capsys.readouterr().out


# ---- without a cluster -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--nodes", "0"), "--nodes 0"),
        (("--gpus", "-1"), "--gpus -1"),
        (("--dir", str(ROOT)), "holds no cluster"),
        (("--dir", "/tmp/" + "long" * 30), "shorter path"),
    ],
)
def test_what_a_cluster_cannot_be(words: tuple[str, ...], told: str) -> None:
    done = cluster_command("up", *(() if "--dir" in words else ("--dir", "/tmp/muster-no-cluster")), *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not Path("/tmp/muster-no-cluster").exists()


def test_what_is_missing_is_said_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_which", lambda program: None)
    why = clusters.missing()
    assert why is not None
    assert "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge" in why
    assert clusters.no_accounting().endswith(" slurmdbd mariadb-server-core mariadb-client-core")
    monkeypatch.setattr(clusters, "_which", lambda program: f"/usr/sbin/{program}")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert "needs root" in (clusters.missing() or "")
    assert clusters.no_accounting() == ""


def failing_installer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installer that prints what mariadb's prints without its client's package: first the cause, then advice."""
    program = folder / "bin/mariadb-install-db"
    program.parent.mkdir()
    told = "\nFATAL ERROR: Could not find /usr/bin/my_print_defaults\n\nThe latest information is at\nhttps://mariadb.com\n"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{told}END\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_a_failure_of_the_databases_installer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_installer(tmp_path, monkeypatch)
    home = Home(tmp_path)
    home.log("x").parent.mkdir()
    made = Cluster(home, Settings(1, 0, 8, 1000, True, True, 0, "here"))
    with pytest.raises(UserError) as raised:
        made._make_database(tmp_path / "mysql")
    log = tmp_path / "log/mariadb-install.out"
    said = "mariadb-install-db: FATAL ERROR: Could not find /usr/bin/my_print_defaults"
    assert str(raised.value) == f"{said}; see {log}"
    assert "https://mariadb.com" in log.read_text()


def test_no_cluster_is_no_mistake(tmp_path: Path) -> None:
    assert cluster_command("status", "--dir", str(tmp_path / "c")).returncode == 1
    assert cluster_command("down", "--dir", str(tmp_path / "c")).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_settings_of_another_version_are_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"nodes": 1}))
    done = cluster_command("down", "--dir", str(tmp_path))
    assert done.returncode == 2
    assert "another version" in done.stderr
    assert (tmp_path / "settings.json").exists()
