"""What the user's hooks get about a life of a job. tests/launch/test_hooks.py shows that they cannot delay anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.schema.slurm import SlurmSection
from slurm.job.hooks import Happened, tell
from tests.distributed import write_config
from tests.slurm.stand_ins import verb
from trainer.life.attempts import End

STOPPED = End("stopped", 40, "step-00000040", True, "warning")


def test_a_requeue_is_told(tmp_path: Path) -> None:
    happened = Happened.of(STOPPED, requeued=True, run="demo", folder="/runs/demo", job="7")
    said: list[str] = []
    hook = f'echo "$MUSTER_EVENT $MUSTER_STEP $MUSTER_CAUSE $MUSTER_JOB: $MUSTER_TEXT" > {tmp_path}/told'
    tell(SlurmSection(hook=hook), happened, said.append)
    text = "demo: requeued at step 40 (warning), job 7"
    assert ((tmp_path / "told").read_text(), said) == (f"requeued 40 warning 7: {text}\n", [])
    tell(SlurmSection(), happened, said.append)  # no hook is called
    assert said == []


def test_a_finished_run_is_no_requeue() -> None:
    happened = Happened.of(End("finished", 9, None, False), requeued=False, run="r", folder="/r", job="7")
    assert (happened.event, happened.cause, happened.text) == ("finished", "", "r: finished at step 9, job 7")


def test_a_webhook_is_named_by_its_variable(tmp_path: Path) -> None:
    """Neither an address, nor a variable that is written into the run folder, is accepted."""
    with pytest.raises(ValueError, match="webhook"):
        SlurmSection(webhook="https://chat/secret")
    config = write_config(tmp_path)
    for section in ("slurm", "monitor"):
        done = verb(tmp_path, "submit", str(config), "--gpus-per-node=1", f"{section}.webhook=MUSTER_CHAT", "--dry-run")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{section}.webhook: variables MUSTER_* are written into the run folder" in done.stderr
