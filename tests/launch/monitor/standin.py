"""Builds the stand-in for libnvidia-ml.so.1, and talks to a process that reads it through the real nvidia-ml-py."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pynvml

ROOT = Path(__file__).resolve().parents[3]
SOURCE = Path(__file__).with_name("standin.c")

# Names in the C source -> the structures of nvidia-ml-py whose offsets they must equal.
_STRUCTS = {
    "nvmlUtilization_t": pynvml.c_nvmlUtilization_t,
    "nvmlMemory_v2_t": pynvml.c_nvmlMemory_v2_t,
    "nvmlFieldValue_t": pynvml.c_nvmlFieldValue_t,
    "nvmlProcessInfo_v3_t": pynvml.c_nvmlProcessInfo_v3_t,
    "nvmlGpmMetric_t": pynvml.c_nvmlGpmMetric_t,
    "nvmlGpmSupport_t": pynvml.c_nvmlGpmSupport_t,
}


def build(folder: Path) -> Path:
    """Compile the library; returns its folder, for LD_LIBRARY_PATH."""
    gcc = shutil.which("gcc")
    assert gcc, "the stand-in for NVML is built by gcc, which is missing: apt-get install gcc libc6-dev"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "layout.h").write_text(layout())
    library = folder / "libnvidia-ml.so.1"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libnvidia-ml.so.1", f"-I{folder}"]
    subprocess.run([gcc, *flags, "-o", str(library), str(SOURCE)], check=True, timeout=60)
    return folder


def layout() -> str:
    """nvidia-ml-py's constants as macros, and assertions of the offset of each field."""
    wanted = ("NVML_ERROR_", "NVML_FI_DEV_NVLINK", "NVML_VALUE_TYPE", "NVML_CLOCK_", "NVML_MEMORY_ERROR", "NVML_GPM_")
    wanted += ("nvmlMemory_v2", "NVML_SUCCESS", "NVML_TEMPERATURE_GPU", "NVML_VOLATILE_ECC")
    constants = {n: v for n, v in vars(pynvml).items() if n.startswith(wanted) and isinstance(v, int)}
    lines = ["#include <stddef.h>", *(f"#define {name} {value}" for name, value in constants.items())]
    for name, struct in _STRUCTS.items():
        lines += _assertions(name, struct)
    whole = " ".join(_assertions("nvmlGpmMetricsGet_t", pynvml.c_nvmlGpmMetricsGet_t))
    return "\n".join([*lines, f"#define LAYOUT_OF_METRICS_GET {whole}", ""])


def _assertions(name: str, struct: Any) -> list[str]:
    asserted = [f'_Static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "{name}");']
    for field, *_ in struct._fields_:
        asserted.append(
            f'_Static_assert(offsetof({name}, {field}) == {getattr(struct, field).offset}, "{name}.{field}");'
        )
    return asserted


class Reader:
    """A process that holds `Gpus` and reads them when asked, while the stand-in's file changes."""

    def __init__(self, library: Path, folder: Path, text: str, env: dict[str, str] | None = None) -> None:
        self._control = folder / "gpus.txt"
        self.write(text)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.monitor.reader"],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
            | {"LD_LIBRARY_PATH": str(library), "STANDIN_NVML": str(self._control), **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def write(self, text: str) -> None:
        """Change the GPUs. A rename replaces the file, so that no half of it is read."""
        new = self._control.with_suffix(".new")
        new.write_text(text)
        os.utime(new, ns=(0, time.monotonic_ns()))
        os.replace(new, self._control)

    def read(self, text: str | None = None, again: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(rows, events reported since), after the GPUs became `text`. `again`: as if a minute had passed."""
        if text is not None:
            self.write(text)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("again\n" if again else "read\n")
        self._process.stdin.flush()
        rows, told = json.loads(self._process.stdout.readline())
        return rows, told

    def close(self) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()
