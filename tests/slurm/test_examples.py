"""The example that starts again by itself, for people's own scripts. test_cluster and test_job run the others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slurm.rehearsal.cluster import Cluster
from tests.distributed import write_config
from tests.slurm.jobs import ROOT, call, submit, wait_for, wait_for_end
from tests.slurm.test_look import slurm
from trainer.life.folder import RunFolder
from trainer.life.rows import read_json, read_rows

REQUEUEING = str(ROOT / "slurm/examples/requeueing.sbatch")


@pytest.mark.full
def test_a_script_that_starts_again_by_itself_and_tells(cluster: Cluster, tmp_path: Path) -> None:
    run, output, told = RunFolder(tmp_path / "run"), tmp_path / "job.txt", tmp_path / "told"
    hook = f'echo "$MUSTER_EVENT $MUSTER_STEP $MUSTER_CAUSE" >> {told}; [ $MUSTER_EVENT = finished ] || sleep 60'
    hooks = {"hook": hook, "webhook": "TEAM_CHAT"}
    config = write_config(tmp_path, train__steps=150, checkpoint__every_steps=0, slurm=hooks)
    request = ["--gpus-per-node=1", "--cpus-per-task=1", "--export=ALL,TEAM_CHAT=http://127.0.0.1:9/secret"]
    job = submit(cluster, *request, f"--output={output}", REQUEUEING, str(config))
    wait_for("rows", lambda: len(read_rows(run.metrics)) > 3)
    call(cluster, "scancel", "--signal=USR2", job)
    wait_for("the next life", lambda: any(row["attempt"] == 1 for row in read_rows(run.metrics)[-1:]))
    step = read_json(run.attempts / "000/end.json")["step"]
    assert read_json(run.attempts / "001/start.json")["start_step"] == step
    row, attempts, lives = (part.splitlines()[1:] for part in slurm(cluster, tmp_path, "status", "run").split("\n\n"))
    columns = re.split(r"  +", row[0])
    assert [columns[1], columns[2].split()[0], columns[3]] == [job, "running", "2"]  # perhaps "running (computing)"
    assert " 1: warning " in row[0]
    assert [line.split()[-2:] for line in attempts] == [["stopped", "warning"], ["-", "-"]]
    assert [line.split()[1] for line in lives] == ["requeued", "running"]
    assert wait_for_end(cluster, job, output) == "COMPLETED", output.read_text()
    assert told.read_text().splitlines() == [f"requeued {step} warning", "finished 150 "]
    said = output.read_text()  # and no life failed because of it
    assert said.count("webhook: Connection refused") == 2
    assert said.count("hook: not done after 4 s, ended") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
