"""The GPUs as the monitor reads them: the real nvidia-ml-py against a stand-in for the driver's library."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest

from launch.monitor.devices import DRIVER_GONE
from launch.monitor.gpm import METRICS
from tests.launch.monitor.standin import Reader, layout

Make = Callable[..., Reader]

GPU = ["GPU-000000a0-aaaa-bbbb-cccc-000000000000", "GPU-000000a1-aaaa-bbbb-cccc-000000000001"]
MIG = ["MIG-000000a1-aaaa-bbbb-cccc-000000000000", "MIG-000000a1-aaaa-bbbb-cccc-000000000001"]
# The readings that each call gives. Without GPM the rates come from counters.
GIVES = {
    "nvmlDeviceGetUtilizationRates": {"gpu_pct", "memory_bus_pct"},
    "nvmlDeviceGetMemoryInfo_v2": {"memory_gib", "memory_total_gib"},
    "nvmlDeviceGetPowerUsage": {"power_w"},
    "nvmlDeviceGetTemperature": {"temperature_c"},
    "nvmlDeviceGetCurrentClocksThrottleReasons": {"throttled"},
    "nvmlDeviceGetEnforcedPowerLimit": {"power_limit_w"},
    "nvmlDeviceGetMaxClockInfo": {"most_sm_clock_mhz"},
    "nvmlDeviceGetTotalEccErrors": {"ecc_corrected", "ecc_uncorrected"},
    "nvmlDeviceGetRetiredPages": {"retired_pages"},
    "nvmlDeviceGetRemappedRows": {"remapped_rows", "remap_pending", "remap_failed"},
    "nvmlDeviceGetCurrPcieLinkGeneration": {"pcie_generation", "pcie_width"},
    "nvmlDeviceGetCurrPcieLinkWidth": {"pcie_generation", "pcie_width"},
    "nvmlDeviceGetMaxPcieLinkWidth": {"most_pcie_width"},
    "nvmlDeviceGetComputeRunningProcesses_v3": {"processes"},
    "nvmlDeviceGetClockInfo": {"sm_clock_mhz", "memory_clock_mhz"},
}
RATES = {"nvlink_tx_mib_s", "nvlink_rx_mib_s", "pcie_tx_mib_s", "pcie_rx_mib_s"}
OF_GPM = {"sm_pct", "occupancy_pct", "tensor_pct", "dram_pct"}
NAMES = {"uuid", "index"}
ALL = set.union(*GIVES.values()) | NAMES | RATES | OF_GPM


def events(told: list[dict[str, object]]) -> list[object]:
    return [one["event"] for one in told]


def test_every_reading_of_several_gpus(reader: Make) -> None:
    one = reader("gpus 2\nprocess 1 4711 2147483648\nset retired_pages@1 3\nset nvmlDeviceGetPowerUsage@0 123400\n")
    one.read()
    rows, told = one.read()
    assert told == []
    assert [row["uuid"] for row in rows] == GPU
    assert [set(row) for row in rows] == [ALL, ALL]
    first, second = rows
    assert (first["power_w"], second["power_w"]) == (123.4, 301.5)
    assert (first["gpu_pct"], second["gpu_pct"]) == (90, 91)
    assert (second["memory_gib"], second["memory_total_gib"]) == (2.0, 80.0)
    assert (first["retired_pages"], second["retired_pages"]) == (0, 3)
    assert second["processes"] == [{"pid": 4711, "memory_gib": 2.0}]
    assert first["sm_clock_mhz"], first["most_sm_clock_mhz"] == (1755, 1980)
    assert {name: first[name] for name in METRICS.values()} == {
        name: metric + 10.25 for metric, name in METRICS.items()
    }


@pytest.mark.parametrize("call", GIVES)
def test_a_call_that_is_not_supported_is_left_out_and_said_once(call: str, reader: Make) -> None:
    one = reader(f"gpus 2\nfail {call}@1 {pynvml.NVML_ERROR_NOT_SUPPORTED}\n")
    _, told = one.read()
    assert {e["event"] for e in told} == {"reading_left_out"}
    assert {e["gpu"] for e in told} == {GPU[1]}
    (first, second), told = one.read(again=True)
    assert told == []
    assert (set(first), set(second)) == (ALL, ALL - GIVES[call])
    (_, second), _ = one.read("gpus 2\n", again=True)
    assert set(second) == ALL - GIVES[call]  # a missing call is not tried again


@pytest.mark.parametrize("call", GIVES)
def test_a_call_that_fails_once_is_asked_again(call: str, reader: Make) -> None:
    one = reader(f"gpus 1\nfail {call} {pynvml.NVML_ERROR_UNKNOWN}\n")
    one.read()
    (row,), told = one.read(again=True)
    assert set(row) == ALL - GIVES[call]
    assert told == []
    (row,), _ = one.read("gpus 1\n", again=True)
    assert set(row) == ALL


@pytest.mark.parametrize(
    "call", ["nvmlGpmQueryDeviceSupport", "nvmlGpmSampleAlloc", "nvmlGpmSampleGet", "nvmlGpmMetricsGet"]
)
def test_without_gpm_the_rates_come_from_counters(call: str, reader: Make) -> None:
    one = reader(f"gpus 1\nfail {call} {pynvml.NVML_ERROR_NOT_SUPPORTED}\n")
    told = one.read()[1] + one.read()[1]
    assert [e["reading"] for e in told] == ["gpm"]
    time.sleep(0.3)  # else the call itself is most of the time between two counts
    (row,), _ = one.read()
    assert set(row) == ALL - OF_GPM
    assert row["nvlink_tx_mib_s"] == pytest.approx(100, rel=0.05)
    assert row["pcie_rx_mib_s"] == pytest.approx(10, rel=0.05)


def test_a_gpu_before_hopper(reader: Make) -> None:
    one = reader("gpus 1\nset gpm 0\n")
    one.read()
    (row,), told = one.read()
    assert set(row) == ALL - OF_GPM
    assert told == []


def test_a_metric_that_gpm_has_not(reader: Make) -> None:
    one = reader(f"gpus 1\nset gpm_{pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL} -1\n")
    one.read()
    (row,), _ = one.read()
    assert set(row) == ALL - {"tensor_pct"}


def test_counters_that_fail_or_run_backwards_give_no_rate(reader: Make) -> None:
    one = reader(f"gpus 1\nset gpm 0\nset fields_code {pynvml.NVML_ERROR_NOT_SUPPORTED}\n")
    one.read()
    assert not RATES & set(one.read()[0][0])
    field = pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES
    one.read("gpus 1\nset gpm 0\n")
    (row,), _ = one.read(f"gpus 1\nset gpm 0\nset field_{field} 5\n")
    assert RATES & set(row) == RATES - {"pcie_tx_mib_s"}
    (row,), _ = one.read(f"gpus 1\nset gpm 0\nset field_{field} 5\n")
    assert row["pcie_tx_mib_s"] == 0.0


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (pynvml.nvmlClocksThrottleReasonGpuIdle, []),
        (pynvml.nvmlClocksThrottleReasonHwThermalSlowdown, ["hw_thermal"]),
        (
            pynvml.nvmlClocksThrottleReasonSwPowerCap | pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
            ["sw_power_cap", "hw_power_brake"],
        ),
    ],
)
def test_throttle_reasons_have_names(bits: int, words: list[str], reader: Make) -> None:
    (row,), _ = reader(f"gpus 1\nset nvmlDeviceGetCurrentClocksThrottleReasons {bits}\n").read()
    assert row["throttled"] == words


# ---- what goes away -------------------------------------------------------------------------------------------------


def test_a_gpu_that_falls_off_the_bus_and_comes_back(reader: Make) -> None:
    one = reader("gpus 2\n")
    one.read()
    rows, told = one.read(f"gpus 2\nfail *@1 {pynvml.NVML_ERROR_GPU_IS_LOST}\n")
    assert rows[1] == {"uuid": GPU[1], "index": 1, "lost": True}
    assert set(rows[0]) == ALL
    (lost,) = told
    assert (lost["event"], lost["gpu"]) == ("gpu_lost", GPU[1])
    assert GPU[1] in str(lost["line"])
    assert one.read(again=True) == ([rows[0] | one.read()[0][0], rows[1]], [])  # reported once
    rows, told = one.read("gpus 2\n", again=True)
    assert events(told) == ["gpu_back"]
    assert [set(row) for row in rows] == [ALL, ALL]


def test_a_driver_that_goes_away_and_comes_back(reader: Make) -> None:
    one = reader("gpus 2\n")
    one.read()
    rows, told = one.read(f"gpus 2\nfail * {pynvml.NVML_ERROR_DRIVER_NOT_LOADED}\n")
    assert rows == []
    assert events(told) == ["driver_gone"]
    assert one.read() == ([], [])
    assert one.read(again=True) == ([], [])  # asked again, and no answer again
    rows, told = one.read("gpus 2\n", again=True)
    assert events(told) == ["driver_back"]
    assert [row["uuid"] for row in rows] == GPU


# Every code, except those of the driver, and those that mean another job's GPU.
REFUSALS = sorted(
    value
    for name, value in vars(pynvml).items()
    if name.startswith("NVML_ERROR_") and value not in DRIVER_GONE | {pynvml.NVML_ERROR_NO_PERMISSION}
)
WHO = ["nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetUUID", "nvmlDeviceGetName"]


@pytest.mark.parametrize("call", WHO)
def test_one_gpu_that_refuses_takes_no_other(call: str, reader: Make) -> None:
    """Whatever code it gives, each GPU keeps its own index."""
    text = "gpus 4\n" + "".join(f"fail {call}@1 {code}\n" for code in REFUSALS[:1])
    one = reader(text)
    one.read()
    for code in REFUSALS:
        one.read(f"gpus 4\nfail * {pynvml.NVML_ERROR_DRIVER_NOT_LOADED}\n")
        rows, told = one.read(f"gpus 4\nfail {call}@1 {code}\n", again=True)
        assert [(row["index"], "lost" in row, "power_w" in row) for row in rows] == [
            (0, False, True),
            (1, True, False),
            (2, False, True),
            (3, False, True),
        ], code
        assert events(told) == ["driver_back", "gpu_lost"]
        assert "GPU 1 " in str(told[1]["line"])
        assert one.read()[1] == []
    rows, told = one.read("gpus 4\n", again=True)
    assert [(e["event"], e["gpu"]) for e in told] == [("gpu_back", GPU[1])]
    one.read()
    assert [set(row) for row in one.read()[0]] == [ALL] * 4


@pytest.mark.parametrize(
    ("visible", "lost", "uuid"),
    [("3,1,0", [False, True, False], "unknown-1"), (f"{GPU[1]},{GPU[0]}", [True, False], GPU[1])],
)
def test_one_that_refuses_keeps_its_place_among_the_jobs(
    visible: str, lost: list[bool], uuid: str, reader: Make
) -> None:
    """Local rank i computes on the i-th GPU."""
    code = pynvml.NVML_ERROR_RESET_REQUIRED
    rows, told = reader(f"gpus 4\nfail {WHO[0]}@1 {code}\n", CUDA_VISIBLE_DEVICES=visible).read()
    assert ["lost" in row for row in rows] == lost
    assert [(e["event"], e["gpu"]) for e in told] == [("gpu_lost", uuid)]


@pytest.mark.parametrize("call", ["nvmlDeviceGetMigDeviceHandleByIndex", "nvmlDeviceGetUUID", "nvmlDeviceGetName"])
def test_one_mig_instance_that_refuses_takes_no_other(call: str, reader: Make) -> None:
    one = reader(f"gpus 1\nmig 0 3\nfail {call}@0/1 {pynvml.NVML_ERROR_UNKNOWN}\n")
    rows, told = one.read()
    assert ["lost" in row for row in rows] == [False, True, False]
    assert events(told) == ["gpu_lost", "reading_left_out"]  # NVML has no utilization of instances


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_INSUFFICIENT_POWER])
def test_one_that_answers_nothing_any_more_is_lost(code: int, reader: Make) -> None:
    one = reader("gpus 2\n")
    one.read()
    rows, told = one.read(f"gpus 2\nfail *@1 {code}\n")
    assert ["lost" in row for row in rows] == [False, True]
    assert events(told) == ["gpu_lost"]
    rows, told = one.read("gpus 2\n", again=True)
    assert [set(row) for row in rows] == [ALL, ALL]
    assert events(told) == ["gpu_back"]


@pytest.mark.parametrize("call", ["nvmlInitWithFlags", "nvmlDeviceGetCount_v2"])
def test_nothing_to_watch_is_said_once(call: str, reader: Make) -> None:
    one = reader(f"gpus 1\nfail {call} {pynvml.NVML_ERROR_UNKNOWN}\n")
    rows, told = one.read()
    assert rows == []
    assert events(told) == ["no_gpus"]
    assert one.read(again=True) == ([], [])


def test_without_nvidia_it_is_said_once(reader: Make, tmp_path: Path) -> None:
    rows, told = reader("", LD_LIBRARY_PATH=str(tmp_path)).read()
    assert rows == []
    assert [(e["event"], e["error"]) for e in told] == [("no_gpus", "NVML Shared Library Not Found")]


def test_beside_dcgm_gpm_is_left_out_and_said(reader: Make, tmp_path: Path) -> None:
    name = tmp_path / "nv-hostengine"
    shutil.copy("/bin/sleep", name)
    with subprocess.Popen([str(name), "60"]) as dcgm:
        try:
            one = reader("gpus 1\n")
            told = one.read()[1]
            (row,), _ = one.read()
        finally:
            dcgm.kill()
    assert events(told) == ["gpm_left_out"]
    assert f"nv-hostengine (pid {dcgm.pid})" in str(told[0]["line"])
    assert set(row) == ALL - OF_GPM


# ---- whose GPUs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "uuids", "unknown"),
    [
        ("1", [GPU[1]], None),
        ("1,0", [GPU[1], GPU[0]], None),
        (GPU[1], [GPU[1]], None),
        ("GPU-000000a1", [GPU[1]], None),  # the beginning of a UUID, which CUDA accepts
        ("0,7,1", [GPU[0]], "7"),
        ("-1", [], "-1"),
        ("", [], None),
        ("GPU-0", [], "GPU-0"),  # the prefix fits both GPUs
        ("0,-1,1", [GPU[0]], "-1"),
        ("0,none,1", [GPU[0]], "none"),
        ("NoDevFiles", [], "NoDevFiles"),
        ("1gpu", [GPU[1]], None),  # CUDA reads the leading digits
        (f"0,{GPU[1]}", [GPU[0]], GPU[1]),  # after an index a UUID counts as none, and the reverse
        (f"{GPU[1]},0", [GPU[1]], "0"),
        ("1,0,1", [], "1"),  # named twice: CUDA then has none
    ],
)
def test_only_the_gpus_of_the_job(visible: str, uuids: list[str], unknown: str | None, reader: Make) -> None:
    rows, told = reader("gpus 2\n", CUDA_VISIBLE_DEVICES=visible).read()
    assert [row["uuid"] for row in rows] == uuids
    assert [(e["event"], e["entry"]) for e in told] == ([("unknown_gpu", unknown)] if unknown else [])


def test_another_jobs_gpu_has_no_index(reader: Make) -> None:
    """As CUDA counts: only the GPUs that this job may open."""
    rows, _ = reader("gpus 3\nclosed 0\n", CUDA_VISIBLE_DEVICES="0").read()
    assert [(row["uuid"], row["index"]) for row in rows] == [(GPU[1], 0)]


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (MIG[1], [MIG[1]]),
        (f"MIG-{GPU[1]}/8/0", [MIG[1]]),  # drivers before 470 gave instances such names
        (f"{MIG[1]},{GPU[0]}", [MIG[1]]),
        (f"{MIG[1]},{MIG[0]}", [MIG[1], MIG[0]]),
        (None, [GPU[0], *MIG]),
    ],
)
def test_mig_instances(visible: str | None, uuids: list[str], reader: Make) -> None:
    one = reader("gpus 2\nmig 1 2\n", **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    one.read()
    rows, _ = one.read()
    assert [row["uuid"] for row in rows] == uuids
    (instance,) = [row for row in rows if row["uuid"] == MIG[1]]
    assert instance["memory_total_gib"] == 10.0
    assert set(instance) == ALL - {"gpu_pct", "memory_bus_pct"}  # NVML has none for GPUs cut into instances


def test_layouts_are_those_of_nvidia_ml_py() -> None:
    """The assertions run while the stand-in is compiled. This checks that there are some."""
    assert layout().count("_Static_assert(offsetof") >= 25
