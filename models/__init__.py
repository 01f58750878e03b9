"""Models: plain modules without collectives, and the registry that builds them by name.

A model takes (tokens, documents, targets) and answers with logits or with sums of the loss; `shard_units`, `blocks` and
`init_parameter` are all that an engine needs to know about its inside, and a plan of `PLANS` for how to split it.
"""

from collections.abc import Callable

from configs.schema.model import ModelSection
from models.cross_entropy import IGNORE, LossSums
from models.decoder import Decoder
from models.tensor import PLANS, TensorPlan

__all__ = ["IGNORE", "PLANS", "REGISTRY", "Decoder", "LossSums", "TensorPlan", "build_model"]

REGISTRY: dict[str, Callable[[ModelSection], Decoder]] = {"decoder": Decoder}


def build_model(section: ModelSection) -> Decoder:
    """The model of a config, on the current default device (under `torch.device("meta")` nothing is allocated).

    Its weights mean nothing yet: fill each with `model.init_parameter`, or load them.
    """
    return REGISTRY[section.name](section)
