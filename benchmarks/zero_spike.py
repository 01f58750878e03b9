"""Can DeepSpeed ZeRO 1, 2 and 3 sit behind the engine protocol? Seven experiments on two gloo ranks, in fp32 and bf16,
judge it against a plain torch loop in one process. One Markdown row each; the exit code is 1 when one fails.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/zero_spike.py --stage N [--json FILE]
"""

import argparse
import json
import math
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.utils import get_global_norm_of_tensors
from deepspeed.utils import logger, safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

VOCABULARY, WIDTH, HIDDEN = 61, 13, 7  # odd on purpose: two ranks divide hardly any parameter evenly
IGNORE, LATE = -100, "down.weight"
ADAM: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
STATES = ("exp_avg", "exp_avg_sq")
TOLERANCE = 2e-6  # the largest absolute difference of a weight or state that the order of summation may cause
Batch = tuple[Tensor, Tensor]  # tokens, targets
Case = tuple[int, torch.dtype]  # ZeRO stage, compute dtype


class Model(nn.Module):
    """A tiny language model with tied head, bias and norm; returns the SUM of the cross-entropy over the targets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        logits = self.head(hidden + self.down(F.gelu(self.up(self.norm(hidden))))).float().flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")


def micro_batches(step: int, rank: int) -> list[Batch]:
    """This rank's three micro batches of a step. Each has another count of targets, and one of rank 1 has none."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens, targets = torch.randint(VOCABULARY, (2, 3, 2, 9), generator=generator)
    masked = torch.tensor([[0.2, 0.5, 0.8], [0.2, 1.0, 0.8]])[rank, :, None, None]
    targets[torch.rand(3, 2, 9, generator=generator) < masked] = IGNORE
    return list(zip(tokens, targets, strict=True))


def inverse_targets(step: int) -> Tensor:  # 1 / the step's target tokens over all ranks and micro batches
    targets = [batch[1] for rank in range(dist.get_world_size()) for batch in micro_batches(step, rank)]
    return 1.0 / (torch.stack(targets) != IGNORE).sum()


def check(condition: bool, text: str) -> None:
    """Fail on every rank when the condition is false on one rank, else the other would wait in a collective."""
    dist.all_reduce(failed := torch.tensor(float(not condition)))
    if failed:
        raise AssertionError(text)


class Reference:
    """The same training in one process: fp32 masters, torch AdamW per parameter, the backward pass in `dtype`."""

    def __init__(self, case: Case, frozen: tuple[str, ...] = (), steps: int = 0) -> None:
        self.dtype, self.model = case[1], Model()
        self.parameters: dict[str, Any] = dict(self.model.named_parameters())
        groups = [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in self.parameters.values()]
        self.optimizer = torch.optim.AdamW(groups, **ADAM)
        self.freeze(frozen)
        for step in range(steps):
            self.train(step)

    def freeze(self, names: tuple[str, ...]) -> None:
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name not in names)

    def loss(self, batch: Batch) -> Tensor:
        cast = {name: parameter.to(self.dtype) for name, parameter in self.parameters.items()}
        return torch.func.functional_call(self.model, cast, batch)

    def backward(self, step: int) -> Tensor:
        """Fill the gradients of a whole step and return their norm."""
        self.optimizer.zero_grad()
        for rank in range(dist.get_world_size()):
            for batch in micro_batches(step, rank):
                (self.loss(batch) * inverse_targets(step)).backward()
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    def train(self, step: int, clip: float = 0.0) -> float:
        norm = self.backward(step)
        torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), clip or math.inf, norm)
        self.optimizer.step()
        return float(norm)

    def tensor(self, key: str) -> Tensor:  # `<parameter>` or `<parameter>.<state>`
        name, _, state = key.rpartition(".")
        return self.optimizer.state[self.parameters[name]][state] if state in STATES else self.parameters[key].detach()

    def steps(self) -> dict[str, int]:
        state = self.optimizer.state
        return {name: int(state[p]["step"]) for name, p in self.parameters.items() if p in state}


class ZeroEngine:
    """The engine protocol over one DeepSpeed engine, started from `source`'s tensors and counts, or fresh weights."""

    def __init__(self, case: Case, frozen: tuple[str, ...] = (), source: Reference | None = None) -> None:
        self.stage, dtype = case
        model, source = Model(), source or Reference(case)
        self.parameters: dict[str, Any] = dict(model.named_parameters())  # DeepSpeed adds attributes to them
        groups: dict[tuple[float, int], list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            if name not in frozen:
                key = 0.1 if parameter.ndim > 1 else 0.0, source.steps().get(name, 0)  # one count per flat group
                groups.setdefault(key, []).append(parameter)
            parameter.requires_grad_(name not in frozen)
        optimizer = torch.optim.AdamW([{"params": p, "weight_decay": key[0]} for key, p in groups.items()], **ADAM)
        # With this threshold some parameters stay whole, so both paths run. `True` would replace F.linear process-wide.
        zero = {"stage": self.stage, "stage3_param_persistence_threshold": 20, "memory_efficient_linear": False}
        config = {
            "train_micro_batch_size_per_gpu": 1,  # feeds DeepSpeed's speed display only
            "gradient_accumulation_steps": 1,  # else DeepSpeed divides the loss and counts the boundary itself
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": zero | {"reduce_bucket_size": 1000},
        }
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
        self.optimizer = self.engine.optimizer
        # DeepSpeed casts the model and makes the fp32 masters from the rounded weights: write the real ones.
        self.load(source)

    def forward_backward(self, micro_batch: Batch, scale: Tensor, last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        total = self.engine(*micro_batch)
        # DeepSpeed averages over the ranks at every stage. This factor undoes that, exactly so for powers of two.
        self.engine.backward(total * (scale * dist.get_world_size()), scale_wrt_gas=False)
        return total.detach()

    def update(self, clip: float, guard: Tensor) -> float:
        """Step; return the gradient norm, infinite when nothing was applied. `guard` is 0, or NaN to refuse."""
        # Summed over ranks first: bf16 at stage 1 takes its norm alone, so a NaN on one rank would stop that rank
        # alone. A NaN in a gradient makes DeepSpeed itself skip the step and clear all its buffers.
        dist.all_reduce(guard)
        gradients = getattr(self.optimizer, "averaged_gradients", None) or self.optimizer.fp32_groups_gradients
        gradients[0][0].add_(guard)
        self.optimizer.clip_grad = clip
        self.engine.step()
        if self.stage == 3:  # else padding keeps the NaN, and an unused parameter its old gradient
            self.optimizer.grad_partitions_flat_buffer.zero_()
        return float(self.engine.get_global_grad_norm())

    def norm(self) -> float:  # before the step, by internals: each optimizer class has others
        if self.stage == 3:
            return float(torch.stack(self.optimizer._get_norm_groups()).norm())
        own = getattr(self.optimizer, "scaled_global_norm", None)  # stages 1 and 2, but not stage 1 with bf16
        return float(own() if own else get_global_norm_of_tensors(self.optimizer.get_grads_for_norm()[0]))

    def evaluate(self, batch: Batch) -> float:
        with torch.no_grad():
            return float(self.engine(*batch))

    def train(self, step: int, clip: float = 0.0, poison: float = 0.0, guard: float = 0.0) -> float:
        """One step as the trainer would do it. A NaN `poison` spoils rank 1's gradient, a NaN `guard` its guard."""
        self.backward(step, poison)
        return self.update(clip, torch.tensor(guard if dist.get_rank() == 1 else 0.0))

    def backward(self, step: int, poison: float = 0.0) -> None:
        for index, batch in enumerate(micro_batches(step, dist.get_rank())):
            spoilt = poison if (dist.get_rank(), index) == (1, 0) else 0.0
            self.forward_backward(batch, inverse_targets(step) + spoilt, last=index == 2)

    def fragments(self) -> Iterator[tuple[str, int, Tensor, slice]]:
        """(name, start, flat, where): this rank owns `flat[where]`, the parameter's row-major order from `start` on.
        `flat` is the fp32 partition that the torch optimizer steps, and the key of its state."""
        for name, parameter in self.parameters.items():
            if mapping := getattr(parameter, "_hp_mapping", None):  # stages 1 and 2; None where nothing is owned
                flat = self.optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
                low, offset = mapping.lp_fragment_address, mapping.hp_fragment_address.start
                yield name, low.start, flat, slice(offset, offset + low.numel)
            elif self.stage == 3 and (id_ := self.optimizer.get_param_id(parameter)) in self.optimizer.grad_position:
                group, offset, padded = self.optimizer.grad_position[id_]
                start = padded * dist.get_rank()
                where = slice(offset, offset + max(0, min(padded, parameter.ds_numel - start)))
                yield name, start, self.optimizer.fp32_partitioned_groups_flat[group], where

    def pieces(self) -> dict[str, tuple[int, Tensor]]:
        """Key -> (start, local tensor) of masters, optimizer state and frozen parameters; runs no collective."""
        found: dict[str, tuple[int, Tensor]] = {}
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:  # in the compute dtype: whole at stages 1 and 2, a flat range at stage 3
                local = parameter.ds_tensor if self.stage == 3 else parameter.view(-1)
                start = len(local) * dist.get_rank() * (self.stage == 3)
                found[name] = start, local.detach()[: max(0, getattr(parameter, "ds_numel", len(local)) - start)]
        for name, start, flat, where in self.fragments():
            state = self.optimizer.optimizer.state.get(flat, {})
            found[name] = start, flat.detach()[where]
            found |= {f"{name}.{key}": (start, state[key][where]) for key in STATES if key in state}
        return found

    def steps(self) -> dict[str, int]:
        state = self.optimizer.optimizer.state
        return {name: int(state[flat]["step"]) for name, _, flat, _ in self.fragments() if state.get(flat)}

    def load(self, source: Reference, low_precision: bool = True) -> None:
        """Write masters and frozen parameters from full tensors, and optimizer state for parameters stepped before."""
        steps, states = source.steps(), self.optimizer.optimizer.state
        for name, _, flat, _ in self.fragments():
            if name in steps and flat not in states:  # no state exists before the first step: make it
                states[flat] = {"step": torch.tensor(float(steps[name])), **{k: torch.zeros_like(flat) for k in STATES}}
        for key, (start, local) in self.pieces().items():
            local.copy_(source.tensor(key).flatten()[start : start + len(local)])
        if self.stage < 3 and steps:
            self.optimizer._lazy_init_hp_params_optimizer_state()  # shows the new state to safe_get_full_...
        if low_precision:
            self.write_low_precision()

    def write_low_precision(self) -> None:
        """Copy the masters into the low-precision weights that forward reads."""
        if self.stage < 3:
            self.optimizer.update_lp_params()
        else:
            self.optimizer._partition_all_parameters()
            for group in range(len(self.optimizer.fp16_groups)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if kept_whole := self.optimizer.persistent_parameters:
                kept_whole[0].all_gather(kept_whole)

    def snapshot(self) -> dict[str, Tensor]:  # a copy of all that a refused step must not change
        found = {key: local.clone() for key, (_, local) in self.pieces().items()}
        found |= {f"{name}.step": torch.tensor(count) for name, count in self.steps().items()}
        return found | {f"{name}.forward": self.whole(name) for name in self.parameters}

    def whole(self, name: str) -> Tensor:  # the weight that forward reads, gathered at stage 3
        with deepspeed.zero.GatheredParameters(self.parameters[name], enabled=self.stage == 3):
            return self.parameters[name].detach().clone()


def check_close(zero: ZeroEngine, reference: Reference, within: float = TOLERANCE) -> str:
    """Both ranks' pieces tile every tensor exactly, and together are as close to the reference as stated."""
    check(zero.steps() == {name: reference.steps()[name] for name in zero.steps()}, "step counts differ")
    ranks: list[dict[str, tuple[int, Tensor]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, zero.pieces())
    apart = torch.tensor(0.0)
    for key in sorted(set().union(*ranks)):
        parts = dict(pieces[key] for pieces in ranks if key in pieces)  # start -> tensor; equal copies count once
        ends = torch.tensor([len(local) for local in parts.values()]).cumsum(0).tolist()
        full, theirs = torch.cat([*parts.values()]), reference.tensor(key).flatten()
        check([*parts, len(theirs)] == [0, *ends], f"{key}: {list(parts)} do not tile {len(theirs)}")
        apart = torch.maximum(apart, (full - theirs.to(full.dtype)).abs().max())  # keeps a NaN, unlike max()
    check(bool(apart <= within), f"differs from the reference by {apart:.1e}")
    return f"±{apart:.0e}"


def accumulation_boundary(case: Case) -> str:
    zero, reference, reductions, apart = ZeroEngine(case), Reference(case), [], torch.tensor(0.0)
    for index, batch in enumerate(micro_batches(0, dist.get_rank())):
        with CommDebugMode() as mode:
            zero.forward_backward(batch, inverse_targets(0), last=index == 2)
        reductions.append(sum(n for op, n in mode.get_comm_counts().items() if "reduce" in str(op)))
    reference.backward(0)
    for name, parameter in zero.parameters.items():
        apart = torch.maximum(apart, (safe_get_full_grad(parameter) - reference.parameters[name].grad).abs().max())
    check(bool(apart <= 1e-6), f"gradients differ by {apart:.1e}")
    zero.update(0.0, torch.tensor(0.0))
    reference.optimizer.step()
    return f"{reductions} reductions, gradients ±{apart:.0e}, step {check_close(zero, reference)}"


def skipped_update(case: Case) -> str:
    """A NaN in rank 1's gradient, and a NaN as rank 1's guard: each before any optimizer state exists and after."""
    zero, reference, norms = ZeroEngine(case), Reference(case), []
    for step, poison in enumerate((math.nan, 0.0, 0.0, math.nan)):
        before = zero.snapshot()
        norms.append(zero.train(99, clip=1.0, poison=poison, guard=0.0 if poison else math.nan))
        check(not math.isfinite(norms[-1]), f"norm {norms[-1]} of a spoilt step")
        after = zero.snapshot()
        same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        check(same, "a refused step changed something")
        kept = vars(zero.optimizer)
        left = [*kept.get("averaged_gradients", {}).values(), *kept.get("fp32_groups_gradients_flat", [])]
        left += [parameter.grad for parameter in zero.parameters.values()]
        check(not any(gradient is not None and gradient.any() for gradient in left), "gradients left")
        zero.train(step), reference.train(step)
        apart = check_close(zero, reference)
    return f"norms {norms}: {len(before)} tensors and counts kept bit for bit on both ranks, clean steps {apart}"


def flat_ranges(case: Case) -> str:
    reference = Reference(case, steps=3)
    zero = ZeroEngine(case, source=reference)
    check_close(zero, reference, within=0.0)
    for name, parameter in zero.parameters.items():
        full = {f"{name}.{key}": safe_get_full_optimizer_state(parameter, key) for key in STATES}
        full[name] = safe_get_full_fp32_param(parameter)
        check(all(torch.equal(full[key], reference.tensor(key)) for key in full), f"{name}: safe_get_full differs")
    zero.train(3), reference.train(3)
    owned = len(zero.pieces()["embed.weight"][1])
    return f"tiled, bit for bit; rank 0: {owned} of 793 of embed.weight; next step {check_close(zero, reference)}"


def step_counts(case: Case) -> str:
    # requires_grad_(False) under a running engine does not freeze: momentum and decay go on with a zero gradient.
    reference = Reference(case, steps=2)
    zero = ZeroEngine(case, source=reference)
    zero.parameters[LATE].requires_grad_(False)
    before = zero.whole(LATE)
    zero.train(2)
    drift = float((zero.whole(LATE) - before).abs().max())
    check(drift > 1e-4, "requires_grad_(False) alone froze the parameter")
    # What works: an engine built without it, and one with groups by step count when the parameter comes back.
    zero = ZeroEngine(case, frozen=(LATE,), source=reference)
    reference.freeze((LATE,))
    zero.train(2), reference.train(2)
    check_close(zero, reference)
    reference.freeze(())
    zero = ZeroEngine(case, source=reference)
    zero.train(3), reference.train(3)
    seen, flats = sorted(set(reference.steps().values())), len(zero.optimizer.optimizer.state)
    check(flats == len(zero.optimizer.param_groups) == 3, "not one count per flat group")
    text = (
        f"requires_grad_(False) alone let {LATE} drift by {drift:.0e}; built without it, then with {flats} flat groups"
    )
    return f"{text} for counts {seen}: {check_close(zero, reference)}"


def low_precision_copy(case: Case) -> str:
    zero, reference, batch = ZeroEngine(case), Reference(case, steps=3), micro_batches(0, 0)[0]
    losses = [zero.evaluate(batch)]
    zero.load(reference, low_precision=False)
    losses.append(zero.evaluate(batch))
    zero.write_low_precision()
    losses += [zero.evaluate(batch), float(reference.loss(batch).detach())]
    check(losses[1] == losses[0], f"forward was not stale: {losses}")
    check(abs(losses[2] - losses[3]) <= 1e-5 * losses[3], f"forward is stale: {losses}")
    return "loss before {:.3f}, masters written {:.3f}, copy written too {:.3f}, reference {:.3f}".format(*losses)


def frozen_parameters(case: Case) -> str:
    frozen = ("embed.weight", "norm.weight")
    zero, reference = ZeroEngine(case, frozen), Reference(case, frozen)
    zero.train(0), reference.train(0)
    apart, pieces = check_close(zero, reference), zero.pieces()
    check(not any(f"{name}.{state}" in pieces for name in frozen for state in STATES), "a frozen parameter has state")
    for name in frozen:
        check(torch.equal(zero.whole(name), Model().get_parameter(name).to(case[1])), f"{name} changed")
    kind = "flat ranges of ds_tensor, GatheredParameters" if case[0] == 3 else "whole on each rank"
    return f"no state, kept bit for bit as {case[1]}, {kind}; the others {apart}"


def norm_and_clipping(case: Case) -> str:
    zero, reference, seen = ZeroEngine(case), Reference(case), []
    for step, factor in enumerate((0.3, 2.0, 0.0)):  # below the norm, above it, off
        clip = factor * float(reference.backward(step))
        zero.evaluate(micro_batches(step, 0)[0])
        zero.backward(step)
        early, norm, expected = zero.norm(), zero.update(clip, torch.tensor(0.0)), reference.train(step, clip)
        check(max(abs(early - expected), abs(norm - expected)) <= 1e-5 * expected, f"{early} {norm} {expected}")
        seen.append(f"{early:.5f}/{norm:.5f}/{expected:.5f}")
    return f"norm before/after step/reference {', '.join(seen)}; clip given per step {check_close(zero, reference)}"


def main() -> int:
    parser = argparse.ArgumentParser(description="DeepSpeed ZeRO behind the engine protocol: seven experiments")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60), verbose=False)
    rows: list[dict[str, Any]] = []
    experiments = [accumulation_boundary, skipped_update, flat_ranges, step_counts, low_precision_copy]
    for number, experiment in enumerate([*experiments, frozen_parameters, norm_and_clipping], start=1):
        rows.append({"experiment": f"{number} {experiment.__name__}", "stage": arguments.stage, "result": "PASS"})
        for key, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            try:
                rows[-1][key] = experiment((arguments.stage, dtype))
            except AssertionError as error:
                rows[-1] |= {key: str(error), "result": "FAIL"}
        if dist.get_rank() == 0:
            print("| {experiment} | {stage} | {result} | {fp32} | {bf16} |".format(**rows[-1]), flush=True)
    if arguments.json and dist.get_rank() == 0:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    dist.destroy_process_group()
    return int(any(row["result"] == "FAIL" for row in rows))


if __name__ == "__main__":
    os._exit(main())  # a plain exit after the last row aborted in 3 of about 25 runs at stage 3, cause not found
