"""A run on one machine never needs the machine's own name: a pod's is often in no DNS and no /etc/hosts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from tests.distributed import write_config
from tests.life.runs import LAUNCH, clean_end, running

_AS_ROOT = () if os.geteuid() == 0 else ("--map-root-user",)
UNKNOWN_HOST = ("unshare", "--uts", *_AS_ROOT, "sh", "-c", 'hostname pod-nowhere.invalid && exec "$@"', "sh")


def test_a_host_whose_name_nothing_resolves_runs_as_any_other(tmp_path: Path) -> None:
    write_config(tmp_path, train__steps=2)
    with running(("env", "-u", "OMP_NUM_THREADS", *UNKNOWN_HOST, *LAUNCH, "--nproc", "2"), tmp_path) as run:
        assert run.wait() == 0, run.output
        clean_end(run)
    threads = int(re.search(r"threads   (\d+) CPU threads? a process: ", run.output)[1])  # type: ignore[index]
    (attempt,) = run.attempts()
    assert json.loads((attempt / "start.json").read_text())["environment"]["OMP_NUM_THREADS"] == str(threads)
    assert "on pod-nowhere.invalid" in run.output
    assert "cannot be retrieved" not in run.output  # torch's message: it would try again for minutes
    assert "Unable to resolve" not in run.output  # gloo's message
