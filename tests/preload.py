"""What the server of tests/distributed.py imports once for all ranks: each rank is a fork of it."""

from __future__ import annotations

import gc

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - with it torch's compiler, seconds of imports
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401

import trainer.attempt
import trainer.debug
import trainer.engines.fsdp
import trainer.engines.zero.engine
import trainer.run
import trainer.start  # noqa: F401

gc.collect()
gc.freeze()  # else each garbage collection of each rank would look at all of it again
