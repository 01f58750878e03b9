"""The endpoint for Prometheus, read by its client's own parser, from a real monitor over stand-in GPUs."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from launch.monitor.prometheus import exposition
from tests.launch.monitor.node import Node
from tests.machine import patience
from tests.made_up import rows, second
from trainer.host.node_name import node_name

DASHBOARD = Path(__file__).resolve().parents[3] / "launch/monitor/grafana.json"


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def get(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return str(answer.read().decode())


def samples(text: str) -> Iterator[Sample]:
    for family in text_string_to_metric_families(text):
        yield from family.samples


def test_every_metric_of_the_dashboard_is_exported(
    node: Callable[..., Node], library: Path, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    monkeypatch.setenv("STANDIN_NVML", str(tmp_path / "gpus.txt"))
    (tmp_path / "gpus.txt").write_text("gpus 2\nset nvmlDeviceGetCurrentClocksThrottleReasons@1 64\n")
    one = node(prometheus_port=port)
    rows(one.folder.root, range(1, 5), number=3, mfu=0.41)
    one.wait_for("rows", lambda: len(one.rows()) > 3)  # GPM and rates need two rows
    told = list(samples(get(port)))
    exported = {sample.name for sample in told}
    wanted = set(re.findall(r"muster_\w+", DASHBOARD.read_text()))
    assert len(wanted) > 20
    assert wanted <= exported, wanted - exported

    assert {(s.labels["run"], s.labels["node"]) for s in told} == {("run", node_name())}
    value: Callable[..., float] = lambda name, **labels: next(  # noqa: E731
        s.value for s in told if s.name == name and labels.items() <= s.labels.items()
    )
    written = one.rows()[-1]
    assert value("muster_gpu_power_w", gpu="1") == written["gpus"][1]["power_w"]
    assert value("muster_gpu_throttled", gpu="1", reason="hw_thermal") == 1.0
    assert value("muster_rank_step", rank="0") == 17.0
    assert value("muster_rank_phase", phase="computing") == 1.0
    assert value("muster_run_loss") == pytest.approx(2.996)
    assert abs(value("muster_row_time_s") - time.time()) < 5
    for row_kind, prefix in (("gpus", "muster_gpu_"), ("ranks", "muster_rank_")):
        for name, reading in written[row_kind][0].items():  # each number of a row has a metric of that name
            if isinstance(reading, int | float) and name not in ("uuid", "index", "rank"):
                assert prefix + name.removeprefix("gpu_") in exported

    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(port, "/")


def test_a_client_that_says_nothing_keeps_the_others_waiting_for_seconds(node: Callable[..., Node], port: int) -> None:
    one = node(prometheus_port=port)
    one.wait_for("a row", one.rows)
    with socket.create_connection(("127.0.0.1", port)):
        time.sleep(0.2)
        began, before = time.monotonic(), len(one.rows())
        assert "muster_host_cpu_pct" in get(port)
        assert time.monotonic() - began < patience(5.0)
        assert len(one.rows()) > before + 3  # meanwhile the monitor went on


def test_a_port_in_use_is_said_and_the_monitor_goes_on(
    node: Callable[..., Node], capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        one = node(prometheus_port=taken)
        one.wait_for("rows", lambda: len(one.rows()) > 3)
        (event,) = one.told("no_prometheus")
        assert (event["address"], event["error"]) == (f"127.0.0.1:{taken}", "Address already in use")
    assert f"no endpoint for Prometheus at 127.0.0.1:{taken}: Address already in use" in capfd.readouterr().out
    assert one.told("monitor_lost") == []


def test_another_address_than_loopback_only_when_told(node: Callable[..., Node], port: int) -> None:
    one = node(prometheus_port=port)
    one.wait_for("a row", one.rows)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


@given(run=st.text(), node=st.text(), uuid=st.text(), watt=st.floats(allow_nan=False))
def test_whatever_a_run_is_called_it_is_read_back(run: str, node: str, uuid: str, watt: float) -> None:
    row: dict[str, Any] = second(0, 2, 0.0, uuid=uuid, power_w=watt)
    text = exposition(run, node, json.loads(json.dumps(row)), {})
    (found,) = [s for s in samples(text) if s.name == "muster_gpu_power_w" and s.labels["gpu"] == "1"]
    assert (found.labels["run"], found.labels["node"], found.labels["uuid"]) == (run, node, uuid)
    assert found.value == watt
