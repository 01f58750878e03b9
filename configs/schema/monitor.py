"""The `monitor` section of the config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.schema.section import MILLION, MOST_PORT, MOST_S, MOST_STEPS, MOST_TIMES, Section, speed


class MonitorSection(Section):
    """The process that watches each node: what it reads, and what it does about it."""

    enabled: bool = speed(True, "start it with `launch run` and with each Slurm job")
    interval_s: float = speed(1.0, "seconds between two rows of gpu/<node>.jsonl", ge=0.05, le=60)
    most_mib: int = speed(
        32, "largest size of a node's file: rollups by the minute are kept longer than rows", ge=1, le=MOST_TIMES
    )
    hang_s: float | None = speed(
        None, "a rank that stands still for longer hangs; default: 0.8 of `parallel.step_timeout_s`", gt=0, le=MOST_S
    )
    window_s: float = speed(60.0, "time over which slow ranks and idle ones are looked for", ge=1, le=MOST_S)
    slow_share: float = speed(
        0.3, "a rank that needs so much more of its own time than the median is named", gt=0, le=MOST_TIMES
    )
    idle_pct: float = speed(
        30.0, "mean SM activity (of CPU ranks: main thread) below which a run is idle", ge=0, le=100
    )
    idle_windows: int = speed(5, "idle windows in a row before it is said", ge=1, le=MOST_TIMES)
    hook: str | None = speed(
        None,
        "shell command told of a hang, a slow rank, an idle run or a lost GPU: $MUSTER_EVENT, $MUSTER_TEXT",
        min_length=1,
    )
    webhook: str | None = speed(
        None,
        "name of the environment variable with a URL, to which the same is posted",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )
    profile_steps: (
        Annotated[list[Annotated[int, Field(ge=0, le=MOST_STEPS)]], Field(min_length=2, max_length=2)] | None
    ) = speed(None, "first and last step to profile; a file PROFILE in the run folder asks for the next three")
    profile_ranks: list[Annotated[int, Field(ge=0, le=MILLION)]] = speed([0], "ranks that write a trace")
    gpm: Literal["auto", "on", "off"] = speed(
        "auto", "SM, tensor and DRAM activity on Hopper and newer; auto: not while DCGM runs on the node"
    )
    prometheus_port: int | None = speed(
        None, "port of each node at which Prometheus reads the newest row, under /metrics", ge=1, le=MOST_PORT
    )
    prometheus_host: str = speed(
        "127.0.0.1", "address it listens at; 0.0.0.0 shows the readings to everybody who reaches the node", min_length=1
    )

    @model_validator(mode="after")
    def _forwards(self) -> MonitorSection:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            first, last = self.profile_steps
            raise ValueError(f"profile_steps: the first step, {first}, comes after the last, {last}")
        return self
