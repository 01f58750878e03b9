"""The faults that can happen to a job, each on the rehearsal cluster with real processes: the job goes on.

Afterwards the losses equal those of a run without a fault, bit for bit. `make slurm` prints a row for each fault, which
docs/slurm.md shows.
"""

from __future__ import annotations

import functools
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from slurm.rehearsal.cluster import Cluster
from slurm.submit import snapshot
from tests.distributed import scratch, train
from tests.slurm.conftest import Note
from tests.slurm.jobs import ROOT, call, job_state, submit, wait_for
from tests.slurm.otherwise import preempting_by_user_signal, read_only, requeueing_on_exit_75
from tests.slurm.runs import STEPS, Rehearsed, config_of, losses
from trainer.life.folder import RunFolder

pytestmark = pytest.mark.timeout(900)


@functools.cache
def straight(steps: int = STEPS, size: int = 4) -> dict[int, tuple[float, float]]:
    """Step -> losses of the same run without a fault, on one node."""
    with scratch() as place:
        assert train(config_of(place, train__steps=steps), size=size) == [0] * size
        curve = losses(RunFolder(place / "run"))
    assert len(curve) == steps
    return curve


# ---- the run is told to stop, saves, and goes on ---------------------------------------------------------------------


def test_warned_and_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """For `make test`, with one rank per node. The test sends the warning: Slurm looks at limits twice a minute."""
    run = Rehearsed(cluster, tmp_path, "--gpus-per-node=1")
    run.wait_for_step(3)
    call(cluster, "scancel", "--signal=USR2", run.job)
    run.wait_for_life(1)
    run.assert_all_had_left()
    run.wait_in_steps(0)
    first, second = run.finish()
    assert (first.reason, first.cause, first.again) == ("stopped", "warning", "scontrol")
    assert (second.reason, second.cause, second.again) == ("finished", None, None)
    assert [(start["life"], start["world_size"]) for start in run.starts()] == [(0, 2), (1, 2)]
    assert run.lost_steps() == 0
    assert losses(run.folder) == straight(size=2)


@pytest.mark.full
def test_time_limit(cluster: Cluster, tmp_path: Path, note: Note) -> None:
    """Three lives in one run."""
    run = Rehearsed(cluster, tmp_path, "--time=60", train__steps=200)
    for life in range(2):
        run.wait_for_step(3, attempt=life)
        run.come_near_the_time_limit()
        run.wait("a requeue", lambda life=life: len(run.events("requeue_asked")) == life + 1)
        run.lift_time_limit()
    run.wait_for_life(2)
    run.wait_in_steps(0)
    outcomes = run.finish()
    assert [(o.life, o.reason) for o in outcomes] == [(0, "stopped"), (1, "stopped"), (2, "finished")]
    assert {o.cause for o in outcomes[:-1]} == {"warning"}
    run.assert_all_had_left()
    assert run.lost_steps() == 0
    assert losses(run.folder) == straight(200)
    told = run.events("stop_passed_on")[0]["time_s"]
    note("time limit, three lives", "warning signal to every node", run.seconds_until_again(told), 0)


@pytest.mark.full
def test_scontrol_requeue(cluster: Cluster, tmp_path: Path, note: Note) -> None:
    run = Rehearsed(cluster, tmp_path, f'slurm.hook=echo "$MUSTER_EVENT" >> {tmp_path}/told')
    run.wait_for_step(7)
    began = time.time()
    call(cluster, "scontrol", "requeue", run.job)
    first, second = run.finish()
    assert (first.reason, first.cause, first.again) == ("stopped", "terminate", "slurm")  # saved within KillWait
    assert (second.life, second.reason) == (1, "finished")
    assert run.events("requeue_asked") == []
    assert run.lost_steps() == 0
    assert losses(run.folder) == straight()
    wait_for("the hook", lambda: (tmp_path / "told").read_text().split() == ["requeued", "finished"], 10)
    note("`scontrol requeue`", "SIGTERM to every node", run.seconds_until_again(began), 0)


@pytest.mark.full
@pytest.mark.alone
def test_our_own_share_of_a_requeue(cluster: Cluster, tmp_path: Path, note: Note) -> None:
    run = Rehearsed(cluster, tmp_path)
    run.wait_for_step(7)
    began = time.time()
    call(cluster, "scancel", "--signal=USR2", run.job)
    first, second = run.finish()
    assert (first.reason, first.cause, first.again) == ("stopped", "warning", "scontrol")
    assert (second.life, second.reason) == (1, "finished")
    run.assert_all_had_left()
    assert losses(run.folder) == straight()
    share = run.own_share_s()
    note(f"`scancel --signal=USR2` ({share:.1f} s of it not Slurm's)", "the signal", run.seconds_until_again(began), 0)
    assert share <= 15


@pytest.mark.full
@pytest.mark.parametrize("told", [True, False], ids=["with-user-signal", "without"])
def test_preemption(told: bool, cluster: Cluster, tmp_path: Path, note: Note) -> None:
    with preempting_by_user_signal(cluster, told):
        run = Rehearsed(cluster, tmp_path)
        run.wait_for_step(7)
        began = time.time()
        other = submit(cluster, "--partition=high", "-N3", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
        first, second = run.finish()
    assert (first.reason, first.cause) == ("stopped", "warning" if told else "terminate")
    assert (second.life, second.reason) == (1, "finished")
    run.assert_all_had_left()
    assert run.lost_steps() == 0
    assert losses(run.folder) == straight()
    assert job_state(cluster, other) == "COMPLETED"
    what = "preemption with `preempt_send_user_signal`" if told else "preemption without it"
    note(what, "the warning signal" if told else "SIGTERM", run.seconds_until_again(began), 0)


@pytest.mark.full
def test_a_stop_is_not_requeued_and_goes_on_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    """A person stops the run on two nodes; the next submission has one."""
    run = Rehearsed(cluster, tmp_path)
    run.wait_for_step(7)
    run.folder.stop.touch()
    (outcome,) = run.finish()
    assert (outcome.reason, outcome.cause, outcome.exit_code) == ("stopped", "stop_file", 3)
    wait_for("end of the job", lambda: job_state(cluster, run.job) == "FAILED")
    assert run.events("requeue_asked") == []
    run.job = run.submit("--nodes=1")
    wait_for("the end", lambda: run.events("ended")[-1]["reason"] == "finished")
    assert [start["world_size"] for start in run.starts()] == [4, 2]
    assert run.lost_steps() == 0
    assert losses(run.folder).keys() == straight().keys()


@pytest.mark.full
def test_what_is_cancelled_stays_so(cluster: Cluster, tmp_path: Path) -> None:
    """It saves nevertheless, as there is time for that."""
    run = Rehearsed(cluster, tmp_path, f'slurm.hook=echo "$MUSTER_EVENT" >> {tmp_path}/told')
    run.wait_for_step(7)
    call(cluster, sys.executable, "-m", "slurm", "cancel", str(run.folder.root))
    (outcome,) = run.finish()
    assert (outcome.reason, outcome.cause, outcome.again) == ("stopped", "terminate", None)
    wait_for("the hook", lambda: (tmp_path / "told").read_text() == "stopped\n", 10)
    wait_for("end of the job", lambda: job_state(cluster, run.job) == "CANCELLED")
    step, _ = run.folder.newest_checkpoint()
    assert step == run.rows()[-1]["step"] > 5
    assert "this job was cancelled" in run.output


@pytest.mark.full
@pytest.mark.parametrize("method", ["chain", "exit"])
def test_where_a_site_forbids_requeueing(method: str, cluster: Cluster, tmp_path: Path) -> None:
    with requeueing_on_exit_75(cluster):
        run = Rehearsed(cluster, tmp_path, f"--requeue={method}")
        run.wait_for_step(7)
        call(cluster, "scancel", "--signal=USR2", run.job)
        first, second = run.finish()
    assert (first.reason, first.again, second.reason) == ("stopped", method, "finished")
    assert (first.job == second.job, second.life) == ((False, 0) if method == "chain" else (True, 1))
    run.assert_all_had_left()
    assert losses(run.folder) == straight()


# ---- something dies --------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_killed_rank(cluster: Cluster, tmp_path: Path, note: Note) -> None:
    run = Rehearsed(cluster, tmp_path)
    run.wait_for_step(7)
    began = time.time()
    run.kill_rank(3)
    (outcome,) = run.finish()
    assert (outcome.life, outcome.reason) == (0, "finished")  # restarted in place, without a requeue
    assert [e["exit_code"] for e in run.events("rank_died") if e["rank"] == 3] == [-signal.SIGKILL]
    assert "rank 3 failed: SIGKILL" in run.output
    assert losses(run.folder) == straight()
    note("`kill -9` of a rank", "its node's agent", run.seconds_until_again(began), run.lost_steps())


@pytest.mark.full
def test_killed_agent(cluster: Cluster, tmp_path: Path, note: Note) -> None:
    run = Rehearsed(cluster, tmp_path)
    run.wait_for_step(7)
    began = time.time()
    run.process("agent", "node2").kill()
    first, second = run.finish()
    assert (first.reason, first.cause, first.failed_nodes) == ("failed", "node_lost", ["node2"])
    assert second.reason == "finished"
    assert run.starts()[-1]["hosts"] == ["node1", "node3"]
    assert losses(run.folder) == straight()
    note("`kill -9` of an agent", "its supervisor", run.seconds_until_again(began), run.lost_steps())


@pytest.mark.full
@pytest.mark.parametrize("node", [1, 2])
@pytest.mark.parametrize("when", ["step", "save"])
def test_killed_node(when: str, node: int, cluster: Cluster, tmp_path: Path, note: Note) -> None:
    run = Rehearsed(cluster, tmp_path, commit_s=3.0 if when == "save" else 0)
    run.wait_for_step(7)
    if when == "save":
        run.wait("a save", lambda: list(run.folder.checkpoints.glob("*.partial-*")))
    began = time.time()
    cluster.kill_node(node)
    try:
        outcomes = run.finish()
    finally:
        cluster.up()
    assert outcomes[-1].reason == "finished"
    assert outcomes[-1].life == 1
    if node != 1:  # the first node takes with it what could have written that: Slurm itself restarts the job
        assert (outcomes[0].cause, outcomes[0].failed_nodes) == ("node_lost", ["node2"])
    assert f"node{node}" not in run.starts()[-1]["hosts"]
    assert losses(run.folder) == straight()
    which = "the first node" if node == 1 else "another node"
    note(f"`kill -9` of {which} during a {when}", "Slurm", run.seconds_until_again(began), run.lost_steps())


@pytest.mark.full
def test_frozen_rank(cluster: Cluster, tmp_path: Path, note: Note) -> None:
    run = Rehearsed(cluster, tmp_path, monitor__hang_s=10.0)
    run.wait_for_step(7)
    began = time.time()
    run.kill_rank(3, signal.SIGSTOP)
    first, second = run.finish()
    assert (first.reason, first.cause, first.failed_nodes, second.reason) == ("failed", "hang", [], "finished")
    (hang,) = run.events("hang")
    assert [(rank["rank"], rank["node"], rank["state"]) for rank in hang["ranks"]] == [(3, "node2", "T")]
    assert hang["why"] == "its process was stopped"
    assert "hang: rank 3 on node2" in run.output
    attempt = run.folder.attempts / "000"
    assert [len(list(attempt.glob(f"{name}-*"))) for name in ("stack", "flight", "hang")] == [4, 4, 2]
    assert losses(run.folder) == straight()
    seconds = run.seconds_until_again(began)
    note("SIGSTOP of a rank (`monitor.hang_s` 10)", "the monitors of both nodes", seconds, run.lost_steps())


# ---- something around the run breaks ---------------------------------------------------------------------------------


@pytest.mark.full
def test_controller_started_again(cluster: Cluster, tmp_path: Path, note: Note) -> None:
    """The controller is away while the run stops and wants a requeue, and comes back later."""
    run = Rehearsed(cluster, tmp_path)
    run.wait_for_step(7)
    controller = cluster.alive("slurmctld")
    assert controller is not None
    began = time.time()
    controller.kill()
    for supervisor in run.processes("supervisor"):
        supervisor.send_signal(signal.SIGUSR2)
    run.wait("the stop", lambda: run.events("ended"))
    time.sleep(30)  # scontrol itself gives up after less than 20 s
    assert run.events("requeue_asked") == []
    cluster.up()
    first, second = run.finish()
    assert (first.reason, second.reason) == ("stopped", "finished")
    run.assert_all_had_left()
    assert losses(run.folder) == straight()
    note("slurmctld away when the run stops", "asked again until it answers", run.seconds_until_again(began), 0)


@pytest.mark.full
def test_run_folder_read_only_for_a_while(cluster: Cluster, tmp_path: Path, note: Note) -> None:
    run = Rehearsed(cluster, tmp_path)
    run.wait_for_step(7)
    with read_only(cluster, run.folder.root):
        run.wait("a save that failed", lambda: "Read-only file system" in run.output)
    (outcome,) = run.finish()
    assert outcome.reason == "finished"
    assert "SAVE FAILED, step-00000010: " in run.output
    rows = losses(run.folder)
    assert rows == {step: straight()[step] for step in rows}
    assert STEPS in rows
    note("run folder read-only for a while", "the save, told in Slurm's log", 0, run.lost_steps())


@pytest.mark.full
def test_edited_working_tree(cluster: Cluster, tmp_path: Path, note: Note) -> None:
    tree = tmp_path / "tree"
    for path in snapshot.files():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tree / path)
    run = Rehearsed(cluster, tmp_path, tree=tree)
    run.wait_for_step(7)
    for path in ("trainer/loop.py", "slurm/job/after.py", "slurm/job/job.py"):
        (tree / path).write_text("raise SystemExit('edited')\n")
    began = time.time()
    call(cluster, "scancel", "--signal=USR2", run.job)
    first, second = run.finish()
    assert (first.reason, second.reason) == ("stopped", "finished")
    assert losses(run.folder) == straight()
    note("working tree edited before a requeue", "nobody: the snapshot runs", run.seconds_until_again(began), 0)


@pytest.mark.full
def test_a_name_that_does_not_resolve(cluster: Cluster, tmp_path: Path) -> None:
    """The fault does not pass, so it is named and the job ends."""
    prolog = tmp_path / "prolog"
    prolog.write_text('#!/bin/sh\n[ "$SLURM_NODEID" = 0 ] || echo export SLURMD_NODENAME=gone.invalid\n')
    prolog.chmod(0o755)
    run = Rehearsed(cluster, tmp_path, f"slurm.srun=[--task-prolog={prolog}]")
    (outcome,) = run.finish()
    assert (outcome.reason, outcome.cause, outcome.exit_code) == ("failed", "mistake", 2)
    assert "error: gone.invalid: the name of node gone.invalid does not resolve here" in run.output
    assert run.events("requeue_asked") == []


@pytest.mark.full
def test_failures_without_progress_end_it(cluster: Cluster, tmp_path: Path) -> None:
    """Each life loses its agent before a checkpoint, and the third life is the last."""
    run = Rehearsed(cluster, tmp_path, checkpoint__every_steps=0, run__give_up_after=3)
    for life in range(3):
        run.wait_for_life(life)
        run.process("agent", run.starts()[-1]["hosts"][1]).kill()
        run.wait("the end of the life", lambda life=life: len(run.lives()) > life)
    outcomes = run.finish()
    assert [o.cause for o in outcomes] == ["node_lost", "node_lost", "giving_up"]
    assert outcomes[-1].exit_code == 1
    assert "too few other nodes" in run.output  # two of three had failed
    assert "giving up after 3 lives without a new checkpoint" in run.output


@pytest.mark.full
def test_lives_in_which_nothing_begins_end_it(cluster: Cluster, tmp_path: Path) -> None:
    """No attempt records these lives, so the lives themselves are counted."""
    prolog = tmp_path / "prolog"
    prolog.write_text("#!/bin/sh\necho export PYTHONHOME=/nowhere\n")  # only where srun starts a process
    prolog.chmod(0o755)
    run = Rehearsed(cluster, tmp_path, f"slurm.srun=[--task-prolog={prolog}]", run__give_up_after=2)
    outcomes = run.finish()
    assert [(o.cause, o.again, o.failed_nodes) for o in outcomes] == [
        ("start_failed", "scontrol", []),
        ("giving_up", None, []),
    ]
    assert run.starts() == []
    assert "giving up after 2 lives without a new checkpoint" in run.output
