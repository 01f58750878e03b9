"""Starts a cluster for a test session, and takes it down when the session ends, for whatever reason.

Its standard input is a pipe whose other end only the session holds. The kernel closes that end with the session, also
after SIGKILL, a timeout or Ctrl-C. Prints the cluster's folder once the cluster is up, or why it is not.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path

from configs.errors import UserError
from slurm.rehearsal import cluster as clusters
from slurm.rehearsal.config import Home

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole session
    with tempfile.TemporaryDirectory(prefix="muster-test-cluster-") as folder:
        home = Home(Path(folder) / "c")
        try:
            clusters.start(home, nodes=3, gpus=4)
            print(home.root, flush=True)
            sys.stdin.read()
        except UserError as error:
            print(error, flush=True)
        finally:
            left = clusters.find(home)
            if left is not None:
                left.down()
