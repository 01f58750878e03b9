"""Models: plain modules without collectives, and `build_model`, which makes them by name.

What an engine must know of one is `models.base.Model`; what a task calls is the module's forward.
"""

from models.base import Model
from models.build import build_model
from models.cross_entropy import IGNORE, LossSums
from models.decoder import Decoder
from models.tensor import PLANS, TensorPlan

__all__ = ["IGNORE", "PLANS", "Decoder", "LossSums", "Model", "TensorPlan", "build_model"]
