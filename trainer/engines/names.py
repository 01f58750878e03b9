"""Names of a model's parameters."""

from torch import nn


def find_aliases(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters -> first name."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if first[id(p)] != name}
