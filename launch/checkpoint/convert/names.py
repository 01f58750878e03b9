"""Names of state: the nested dicts that PyTorch's users keep, and Muster's flat names.

A nested state is a list of leaves, each with its path: ("model", "blocks.0.wq.weight"), ("optim", "state",
"blocks.0.wq.weight", "exp_avg"), ("step",). A parameter's name loses the words that only mean "the model". Optimizer
state becomes `<parameter>.<state>`, its `step` an integer. A value that is neither a tensor nor plain is listed in
`left_out`, so that nothing disappears without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from configs.errors import UserError
from launch.checkpoint.convert.state import Content, State, StateTensor
from trainer.checkpoint.format.boxes import Group
from trainer.checkpoint.format.strict import parse

Path_ = tuple[str | int, ...]
FACTS = "muster"  # the leaf in which our own targets keep a manifest's fields

_MODEL_WORDS = {"model", "state_dict", "model_state_dict", "model_state", "module"}
_OPTIM_WORDS = "optim|optimizer|optimizers|opt|optim_state_dict|optimizer_state_dict|optim_state|optimizer_state"
_OPTIM_STATE = re.compile(rf"(?:^|\.)(?:{_OPTIM_WORDS})\.state\.(?P<name>.+)\.(?P<state>[^.]+)$")
_OPTIM_OTHER = re.compile(rf"(?:^|\.)(?:{_OPTIM_WORDS})\.(?P<rest>(?:param_groups|state)(?:\.|$).*)")
_STEP_WORDS = {"step", "global_step", "iteration", "steps"}
# The default parameter group of torch.optim.AdamW. Making an optimizer imports the compiler, which takes seconds.
_ADAMW_GROUP = {
    "lr": 1e-3,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "weight_decay": 0.01,
    **dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable"), False),
    **dict.fromkeys(("foreach", "fused")),
    "decoupled_weight_decay": True,
}
_NODES_LIMIT = 5_000_000
_DEPTH_LIMIT = 32


def leaves_of(where: str, root: dict[Any, Any]) -> Iterator[tuple[Path_, Any]]:
    """The leaves of nested dicts, and of lists that hold tensors or dicts. An empty dict gives no leaf."""
    left = _NODES_LIMIT

    def walk(path: Path_, thing: Any) -> Iterator[tuple[Path_, Any]]:
        nonlocal left
        left -= 1
        if left < 0 or len(path) > _DEPTH_LIMIT:
            raise UserError(f"{where}: nested too deep or too wide for a checkpoint")
        if isinstance(thing, dict):
            for key, value in thing.items():
                yield from walk((*path, key if isinstance(key, int) else str(key)), value)
        elif isinstance(thing, list | tuple) and any(_is_inner(entry) for entry in thing):
            for index, value in enumerate(thing):
                yield from walk((*path, index), value)
        else:
            yield path, thing

    yield from walk((), root)


def _is_inner(thing: Any) -> bool:
    return isinstance(thing, dict | list | tuple) or is_content(thing)


def is_content(thing: Any) -> bool:
    return hasattr(thing, "read_range_into")


def sort_leaves(state: State, leaves: Iterable[tuple[Path_, Any]], weights_only: bool) -> None:
    """Fill `state` from the leaves of another kind of checkpoint. Raises UserError when they are no training state."""
    found = list(leaves)
    numbered = _parameter_names(found)
    has_model = any(_model_name(path) for path, leaf in found if is_content(leaf))
    facts: Any = None
    for path, leaf in found:
        dotted = ".".join(map(str, path))
        is_step = path[-1] in _STEP_WORDS and len(path) < 3
        if match := _OPTIM_STATE.search(dotted):
            if not weights_only:
                name = numbered.get(match["name"], match["name"])
                if name.isdigit():
                    raise UserError(_numbered(state))
                _add_state(state, name, match["state"], leaf, dotted)
        elif _OPTIM_OTHER.search(dotted):
            if not weights_only:
                add_value(state, dotted, leaf)
        elif dotted == FACTS:
            facts = leaf
        elif is_step and not _model_name(path) and (step := whole_number(leaf)) is not None:
            state.facts["step"] = step
        elif is_content(leaf):
            _add_tensor(state, _model_name(path) if has_model else dotted, dotted, "model", leaf)
        else:
            add_value(state, dotted, leaf)
    _untie(state)
    if facts is not None:
        _add_facts(state, facts)
    _check(state)


def _model_name(path: Path_) -> str | None:
    """The parameter's name, without the words before it; None when the path does not mean a parameter."""
    for depth in (0, 1):
        if len(path) > depth + 1 and path[depth] in _MODEL_WORDS:
            return ".".join(map(str, path[depth + 1 :]))
    return None


def _parameter_names(leaves: list[tuple[Path_, Any]]) -> dict[str, str]:
    """Number -> name, where an optimizer keeps its parameters by number and their names beside them."""
    numbers: dict[str, Any] = {}
    for path, leaf in leaves:
        match = _OPTIM_OTHER.search(".".join(map(str, path)))
        if match and path[-1] in ("params", "param_names"):
            numbers[match["rest"]] = leaf
    names: dict[str, str] = {}
    for key, values in numbers.items():
        named = numbers.get(key.removesuffix("params") + "param_names") if key.endswith(".params") else None
        if isinstance(values, list) and isinstance(named, list) and len(values) == len(named):
            names |= {str(number): str(name) for number, name in zip(values, named, strict=True)}
    return names


def _numbered(state: State) -> str:
    return (
        f"{state.path}: its optimizer state goes by number, not by parameter name, so it cannot be told whose it is; "
        "save it with\ntorch.distributed.checkpoint.state_dict.get_optimizer_state_dict, or take the weights alone: "
        "--take weights"
    )


def _add_tensor(state: State, name: str | None, dotted: str, group: Group, leaf: Content) -> None:
    key = name or dotted
    if key in state.tensors:
        raise UserError(f"{state.path}: two tensors would be called {key}; one of them is {dotted}")
    state.tensors[key] = StateTensor(group, leaf)


def _add_state(state: State, name: str, kind: str, leaf: Any, dotted: str) -> None:
    if kind == "step":
        count = whole_number(leaf)
        if count is None:
            raise UserError(f"{state.path}: {dotted} is not a whole number of steps")
        state.step_counts[name] = count
    elif is_content(leaf):
        _add_tensor(state, f"{name}.{kind}", dotted, "optim", leaf)
    elif isinstance(leaf, int | float) and not isinstance(leaf, bool):
        dtype = torch.float64 if isinstance(leaf, float) else torch.int64
        _add_tensor(state, f"{name}.{kind}", dotted, "optim", Number(leaf, dtype))
    elif leaf is not None:
        add_value(state, dotted, leaf)


class Number:
    """A plain number, in the form of a tensor without dimensions."""

    shape = ()

    def __init__(self, value: float, dtype: torch.dtype) -> None:
        self.value, self.dtype = value, dtype

    def read_range_into(self, start: int, out: torch.Tensor) -> None:
        out.fill_(self.value)


def whole_number(leaf: Any) -> int | None:
    """The count in a leaf that is a whole number, or a tensor that holds one; else None."""
    if is_content(leaf):
        if tuple(leaf.shape) not in ((), (1,)) or leaf.dtype == torch.bool:
            return None
        out = torch.empty(1, dtype=leaf.dtype)
        leaf.read_range_into(0, out)
        leaf = out.item()
    if isinstance(leaf, bool) or not isinstance(leaf, int | float) or leaf != leaf or abs(leaf) >= 1 << 53:
        return None
    return int(leaf) if leaf == int(leaf) and leaf >= 0 else None


def add_value(state: State, dotted: str, leaf: Any) -> None:
    try:
        state.values[dotted] = json.loads(json.dumps(leaf, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        state.left_out.append(dotted)


def _untie(state: State) -> None:
    """Make tensors that lie in the very same place one tensor with several names."""
    first: dict[Any, str] = {}
    for key, tensor in list(state.tensors.items()):
        place = getattr(tensor.content, "place", None)
        if tensor.group == "optim" or place is None or not tensor.numel:
            continue
        if place in first:
            state.aliases[key] = first[place]
            del state.tensors[key]
        else:
            first[place] = key
    counts = state.step_counts
    state.step_counts = {state.aliases.get(name, name): count for name, count in counts.items()}


def facts_text(state: State) -> str:
    """The text that our own targets keep beside the tensors, so that converting back loses nothing."""
    frozen = sorted(key for key, tensor in state.tensors.items() if tensor.group == "frozen")
    trained = {k: n for k, n in state.trained_steps.items() if n != state.step or k in frozen}
    return json.dumps({"facts": state.facts, "aliases": state.aliases, "frozen": frozen, "trained_steps": trained})


def _add_facts(state: State, text: Any) -> None:
    try:
        told = parse(text.encode())
        state.facts |= dict(told["facts"])
        if type(state.facts.get("step", 0)) is not int:
            raise TypeError("a step that is no whole number")
        for name, first in dict(told["aliases"]).items():
            # The file may list the names of a tied tensor in any order. The first name that Muster chose wins.
            if state.aliases.get(first) == name:
                state.tensors[first] = state.tensors.pop(name)
                state.aliases = {k: first if v == name else v for k, v in state.aliases.items() if k != first}
                state.aliases[name] = first
        for key in told["frozen"]:
            if key in state.tensors:
                state.tensors[key] = StateTensor("frozen", state.tensors[key].content)
        state.trained_steps |= {str(k): int(v) for k, v in told["trained_steps"].items() if k in state.tensors}
        for key, tensor in state.tensors.items():
            if tensor.group != "optim":
                state.trained_steps.setdefault(key, state.step)
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{state.path}: {FACTS!r} in it is not what Muster writes there") from None


def _check(state: State) -> None:
    owners = {key.rpartition(".")[0] for key, tensor in state.tensors.items() if tensor.group == "optim"}
    strangers = sorted((owners | state.step_counts.keys()) - state.parameters().keys() - state.aliases.keys())
    if strangers:
        raise UserError(
            f"{state.path}: optimizer state of {strangers[0]}, which is not among its parameters; "
            "take the weights alone: --take weights"
        )
    if not state.parameters():
        raise UserError(f"{state.path}: it holds no tensors that could be parameters")


def nested(state: State) -> dict[str, Any]:
    """A state in the form that PyTorch's users keep: dicts whose leaves are contents and plain values."""
    model: dict[str, Any] = {key: tensor.content for key, tensor in state.parameters().items()}
    model |= {alias: model[name] for alias, name in state.aliases.items()}
    found: dict[str, Any] = {"model": model, "step": state.step, FACTS: facts_text(state)}
    states: dict[str, dict[str, Any]] = {
        name: {kind: tensor.content for kind, tensor in kinds.items()} for name, kinds in state.optimizer().items()
    }
    for name, count in state.step_counts.items():
        # the dtype that torch.optim uses; fp32 is exact up to 2^24
        exact = torch.float32 if count <= 1 << 24 else torch.float64
        states.setdefault(name, {})["step"] = Number(count, exact)
    if states:
        found["optim"] = {"state": states, "param_groups": param_groups(state, sorted(states))}
    return found


def param_groups(state: State, names: list[str]) -> list[dict[str, Any]]:
    """The optimizer's groups that the source held; else one AdamW group with the config's numbers."""
    groups: dict[int, dict[str, Any]] = {}
    for dotted, value in state.values.items():
        match = re.search(r"\.param_groups\.(\d+)\.([^.]+)$", dotted)
        if match:
            groups.setdefault(int(match[1]), {})[match[2]] = value
    if groups:
        return [groups[index] for index in sorted(groups)]
    kinds = {kind for owned in state.optimizer().values() for kind in owned}
    if kinds != {"exp_avg", "exp_avg_sq"}:
        return [{"params": names}]
    told = state.facts.get("config", {}).get("optim", {})
    known = {key: told[key] for key in ("lr", "betas", "eps", "weight_decay") if key in told}
    return [{**_ADAMW_GROUP, **known, "params": names}]
