"""Where DeepSpeed keeps what this rank owns. The only file that knows DeepSpeed's inside, of 0.19.8 and its fixes.

Parameters that train lie end to end in flat fp32 tensors, the masters, which the torch optimizer steps as if each were
one parameter. Stages 1 and 2 cut the flat tensor of a group into equal parts, one per rank, wherever that falls. Stage
3 cuts each parameter, and a rank's parts of all of them make its flat tensor. What forward reads is another copy.

With `device: nvme` flat tensors of at least 1 MiB and their state are empty between steps and lie in files. So do parts
of that size of what forward reads. Tensors that map these files stand for them here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.engines.zero.swapped import Mappings


@dataclass(frozen=True)
class Fragment:
    """What this rank owns of a parameter: `length` elements of its row-major order from `start` on, which lie in the
    flat tensor of number `flat` from `offset` on. Perhaps none."""

    start: int
    length: int
    flat: int
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This fragment of the flat tensor, or of a state of the same form; shares its memory."""
        return flat.detach()[self.offset : self.offset + self.length]


def share_of(numel: int, rank: int, ranks: int) -> tuple[int, int]:
    """(start, length) of a rank's part of a tensor that is cut into as many equal ones, as stage 3 cuts it."""
    size = -(-numel // ranks)
    start = min(size * rank, numel)
    return start, min(size, numel - start)


class Partitions:
    """One DeepSpeed engine's parts on this rank. `groups` are the names in each parameter group of its optimizer."""

    def __init__(self, engine: Any, stage: int, trained: Mapping[str, nn.Parameter], groups: Sequence[Sequence[str]]):
        self._engine, self._stage, self._trained = engine, stage, trained
        self._zero = engine.optimizer
        self._swapper: Any = getattr(self._zero, "optimizer_swapper", None)
        if self._swapper is not None:
            self._swapper.swap_out_gradients = self._keep_gradients
        self._files = Mappings()
        self.optimizer: torch.optim.Optimizer = self._zero.optimizer
        if stage == 3:
            names = {id(parameter): name for name, parameter in trained.items()}
            self._flats: list[Any] = self._zero.fp32_partitioned_groups_flat
            self.names = [[names[id(parameter)] for parameter in group] for group in self._zero.fp16_groups]
        else:
            self._flats = [group["params"][0] for group in self.optimizer.param_groups]
            self.names = [list(group) for group in groups]
        number = {name: k for k, group in enumerate(self.names) for name in group}
        self.fragments = {name: self._fragment(p, number[name]) for name, p in trained.items()}

    def _fragment(self, parameter: Any, flat: int) -> Fragment:
        if self._stage == 3:
            _, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = min(size * self._rank, parameter.ds_numel)  # the last ranks' parts are filled up with padding
            return Fragment(start, min(size, parameter.ds_numel - start), flat, offset)
        mapping = parameter._hp_mapping
        if mapping is None:  # all of it lies on other ranks
            return Fragment(0, 0, flat, 0)
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(there.start, there.numel, flat, here.start)

    @property
    def _rank(self) -> int:
        return int(self._engine.global_rank)

    # ---- masters and their state -------------------------------------------------------------------------------------

    def _swapped(self, number: int) -> Any:
        """What DeepSpeed knows of the files of flat tensor `number`; None when it lies in memory."""
        if self._swapper is None or not self._zero._swappable_optimizer_subgroup(number):
            return None
        return self._swapper.swap_params_info[self._flats[number].ds_id]

    def flat(self, number: int) -> torch.Tensor:
        """The masters of group `number`, to read and to write."""
        flat, swapped = self._flats[number], self._swapped(number)
        if swapped is None:
            return flat
        return self._files.tensor(Path(swapped.tensors[0].swap_path), flat.dtype, swapped.numel())

    def state(self, number: int) -> dict[str, Any]:
        """What the optimizer keeps for group `number`, by key: tensors of the form of `flat`, and perhaps a count."""
        state, swapped = self.optimizer.state.get(self._flats[number], {}), self._swapped(number)
        if swapped is None:
            return dict(state)
        paths = {id(context.compute_tensor): Path(context.swap_path) for context in swapped.tensors[1:]}
        return {
            key: self._files.tensor(paths[id(value)], value.dtype, swapped.numel()) if id(value) in paths else value
            for key, value in state.items()
        }

    def add_state(self, number: int, key: str) -> torch.Tensor:
        """Zeros as state `key` of group `number`, which it does not have yet."""
        flat, swapped = self._flats[number], self._swapped(number)
        if swapped is None:
            self.optimizer.state[flat][key] = torch.zeros_like(flat, requires_grad=False)
            return self.optimizer.state[flat][key]
        made: Any = torch.empty(0, dtype=flat.dtype)
        made.ds_id = f"{key}-{flat.ds_id}"
        self.optimizer.state[flat][key] = made
        swapped.add_state_tensors([made])
        file_bytes = self._swapper._io_aligned_numel(swapped.numel()) * flat.element_size()
        return self._files.zeros(Path(swapped.tensors[-1].swap_path), flat.dtype, swapped.numel(), file_bytes)

    def set_count(self, number: int, count: int) -> None:
        """Updates that the state of group `number` has seen."""
        flat = self._flats[number]
        # fused Adam keeps its count in fp32 beside the parameter
        self.optimizer.state[flat]["step"] = torch.tensor(float(count), dtype=torch.float32, device=flat.device)

    def forget_state(self) -> None:
        self.optimizer.state.clear()
        if self._swapper is not None:
            self._swapper.purge_state()

    @contextmanager
    def _present(self, number: int) -> Iterator[None]:
        """DeepSpeed's own tensor of the masters is not empty inside."""
        if self._swapped(number) is None:
            yield
            return
        self._flats[number].data = self.flat(number)
        yield
        self._flats[number].data = torch.empty(0, dtype=self._flats[number].dtype)

    # ---- what forward reads ------------------------------------------------------------------------------------------

    def frozen(self, parameter: Any) -> tuple[int, torch.Tensor]:
        """(start, elements) of what forward reads of a parameter that does not train: whole at stages 1 and 2."""
        if self._stage < 3:
            return 0, parameter.detach().view(-1)
        start, length = share_of(parameter.ds_numel, self._rank, self._engine.dp_world_size)
        part = parameter.ds_tensor
        if part.final_location == "nvme":
            swapper = parameter.nvme_swapper
            return start, self._files.tensor(Path(swapper.get_path(parameter, True)), swapper.dtype, length)
        return start, part.detach()[:length]

    @torch.no_grad()
    def copy_to_compute(self) -> None:
        """Bring what forward reads up to date with the masters, and with what `frozen` gave. A collective."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero.checkpoint_event_prologue()
        for number in range(len(self._flats)):
            with self._present(number):
                self._zero._reassign_or_swap_out_partitioned_parameters(number)
        self.close_files()  # DeepSpeed reads past the cache
        self._zero.checkpoint_event_epilogue()

    def close_files(self) -> None:
        """What was written into mapped tensors goes to the disk, and the mappings go."""
        self._files.close()

    def free(self, parameters: Iterable[Any]) -> None:
        """Give back the buffers of parameters on disk: they are page-locked, and the process holds them."""
        swappers = {id(p.nvme_swapper): p.nvme_swapper for p in parameters if getattr(p, "nvme_swapper", None)}
        for swapper in swappers.values():
            for buffer in (swapper.buffers, swapper.partitioned_swap_buffer):
                if buffer is not None:
                    swapper.aio_read_handle.free_cpu_locked_tensor(buffer)

    # ---- gradients ---------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Remove the gradients that DeepSpeed keeps after a step.

        At stage 3 a parameter that the next step does not use would get the old gradient again, and padding would keep
        a NaN. At stages 1 and 2, offloaded in bf16, the gradients of a skipped step would be added to the next ones."""
        buffer = getattr(self._zero, "grad_partitions_flat_buffer", None)
        if buffer is not None:
            buffer.zero_()
        averaged: dict[int, Any] = getattr(self._zero, "averaged_gradients", {}) if self._stage < 3 else {}
        averaged.update(dict.fromkeys(averaged))
        for swapped in () if self._swapper is None else self._swapper.swap_params_info.values():
            swapped.release_unswapped_gradients()
        self.close_files()

    def _keep_gradients(
        self, parameter: Any, gradient_offsets: Sequence[int], gradient_tensors: Sequence[torch.Tensor]
    ) -> None:
        """In place of DeepSpeed's own, which writes gradients to files and reads these into the middle of a buffer.
        Where a parameter does not begin at a multiple of 512 bytes, such a read (O_DIRECT) gives garbage, silently. The
        memory that they were added up in is taken in any case."""
        kept = self._swapper.swap_params_info[parameter.ds_id].unswapped_gradients
        kept.update(zip(gradient_offsets, (tensor.cpu() for tensor in gradient_tensors), strict=True))

    def fill_gradients(self) -> None:
        """Before the step: a swapped parameter without a gradient would get what lies in the buffer; it gets zeros."""
        if self._swapper is None:
            return
        for name, fragment in self.fragments.items():
            number, flat = self._zero.get_param_id(self._trained[name]), self._flats[fragment.flat]
            if number not in self._zero.norm_for_param_grads and self._swapped(fragment.flat) is not None:
                _, offset, size = self._zero.grad_position[number]
                self._keep_gradients(flat, [offset], [torch.zeros(size, dtype=flat.dtype)])

    def gradient(self, name: str) -> torch.Tensor | None:
        """The whole gradient of a parameter, between backward and the step. A collective."""
        from deepspeed.utils import safe_get_full_grad

        found: torch.Tensor | None = safe_get_full_grad(self._trained[name])
        return found


def partition_module(module: nn.Module, settings: dict[str, Any], like: Any | None) -> None:
    """Cut a module's own parameters for stage 3, which `like`, one that was cut before, knows how to. A collective."""
    import deepspeed

    if like is None:
        deepspeed.zero.Init(module=module, config_dict_or_path=settings)
    else:
        like.convert_to_zero_parameters(param_list=list(module.parameters(recurse=False)))


def leave_secondary_group() -> None:
    """End the group over which ZeRO++ keeps parameters once more: a process may have one, and does not give it up with
    the engine."""
    import deepspeed
    from deepspeed.utils import groups

    group = groups._get_zero_param_intra_parallel_group()
    if group is not None:
        deepspeed.comm.destroy_process_group(group)
