"""Trains a small net under plain DeepSpeed, saves it as DeepSpeed does, and writes down what the ranks held.

    torchrun --nproc_per_node 2 tests/trainer/checkpoint/deepspeed_folder.py FOLDER --stage 3 --dtype bf16

It imports nothing of Muster, so that any version of DeepSpeed can run it. `FOLDER/told.pt` comes from DeepSpeed's own
accessors on the ranks. It holds each parameter, `<parameter>.exp_avg`, `<parameter>.exp_avg_sq`, and each buffer.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

STEPS = 3
FROZEN = ("base.weight", "norm.bias")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Net(nn.Module):
    """No size divides by 2 or 3, and some are smaller than the number of ranks. The head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.base = nn.Linear(5, 7, bias=False)
        self.norm = nn.LayerNorm(7)
        self.out = nn.Linear(7, 5)
        self.scale = nn.Parameter(torch.tensor([0.5]))
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.linspace(-1, 1, 5))
        self.register_buffer("seen", torch.tensor(0))  # an integer without dimensions
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        x = self.norm(self.base(self.embed(tokens)))
        return self.head(self.out(torch.tanh(x)) * self.scale + self.shift.to(x.dtype))


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """The usual two parameter groups."""
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if name.endswith("weight")]
    return [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for name, p in trained if not name.endswith("weight")], "weight_decay": 0.0},
    ]


def write(
    folder: str,
    stage: int,
    dtype: str,
    make: Callable[[], nn.Module] = Net,
    frozen: tuple[str, ...] = FROZEN,
    more: dict[str, Any] | None = None,
) -> None:
    """One rank's part. `frozen`: patterns; `more`: further settings."""
    warnings.simplefilter("ignore")
    import deepspeed

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    os.environ.update({key: os.environ.get(key, value) for key, value in alone.items()})
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled at the first start
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(5)
    net = make()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in frozen))
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 40,
        **(more or {}),
    }
    settings["zero_optimization"] = {
        "stage": stage,
        "reduce_bucket_size": 1000,
        **settings.get("zero_optimization", {}),
    }
    optimizer = torch.optim.AdamW(groups(net), lr=0.05)
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)[0]
    tokens = torch.arange(4 * 6).reshape(4, 6) * 7 % 11
    for step in range(STEPS):
        inputs = (tokens + torch.distributed.get_rank() + step) % 11
        loss = nn.functional.cross_entropy(engine(inputs).float().flatten(0, 1), (inputs.flatten() * 3 + 1) % 11)
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(folder, client_state={"epoch": 2})
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # Its accessors know only the optimizer state from after the first group's first step: that of this group alone.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    told = gathered(engine.module, stage)
    if torch.distributed.get_rank() == 0:
        torch.save(told, os.path.join(folder, "told.pt"))
    torch.distributed.barrier()


def gathered(net: nn.Module, stage: int) -> dict[str, torch.Tensor]:
    """Whole parameters, states and buffers by name. A collective."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    kept = net.state_dict().keys()
    found = {name: buffer.clone() for name, buffer in net.named_buffers() if name in kept}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            found[name] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name}.{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
        elif stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        else:
            found[name] = parameter.detach().clone()
    return found


if __name__ == "__main__":
    words = argparse.ArgumentParser()
    words.add_argument("folder")
    words.add_argument("--stage", type=int, required=True)
    words.add_argument("--dtype", choices=DTYPES, default="bf16")
    options = words.parse_args()
    write(options.folder, options.stage, options.dtype)
    sys.stdout.flush()
    os._exit(0)  # some versions abort while the interpreter ends
