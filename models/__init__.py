"""Models: plain modules without collectives, and the registry that builds them by name.

A model takes (tokens, documents, targets) and answers with logits or with sums of the loss; `shard_units`, `blocks` and
`init_parameter` are all that an engine needs to know about its inside, and a plan of `PLANS` for how to split it.
"""

from collections.abc import Callable

from configs.schema.model import DecoderSection, ModelSection
from models.cross_entropy import IGNORE, LossSums
from models.decoder import Decoder
from models.tensor import PLANS, TensorPlan

__all__ = ["IGNORE", "PLANS", "REGISTRY", "Decoder", "LossSums", "TensorPlan", "build_model"]

REGISTRY: dict[str, Callable[[DecoderSection], Decoder]] = {"decoder": Decoder}


def build_model(section: ModelSection) -> Decoder:
    """The model of a config, on the current default device (under `torch.device("meta")` nothing is allocated).

    Its weights mean nothing yet: fill each with `model.init_parameter`, or load them. Raises TypeError where it is
    no decoder.
    """
    if not isinstance(section, DecoderSection):
        raise TypeError(f"model.name is {section.name}, not decoder")
    return REGISTRY[section.name](section)
