"""What DeepSpeed of 2023 lacks on a machine without a GPU and with today's PyTorch.

With this folder and that of an installed DeepSpeed 0.10.0 (and pydantic 1) on PYTHONPATH, `deepspeed_folder.py` writes
the folders `deepspeed-0.10.0`.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from typing import Any

for missing in ("intel_extension_for_pytorch", "oneccl_bindings_for_pytorch"):
    sys.modules[missing] = types.ModuleType(missing)


class Nothing:
    """Stands in for a stream or an event, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def elastic(module: Any) -> None:
    module.log = logging.getLogger("elastic")
    module._get_socket_with_port = None


def accelerator(module: Any) -> None:
    kind = module.CPU_Accelerator
    first = kind.__init__

    def init(self: Any) -> None:
        first(self)
        self._communication_backend_name = "gloo"

    kind.__init__ = init
    kind.Event = kind.Stream = property(lambda self: Nothing)
    kind.stream = kind.current_stream = kind.default_stream = lambda self, *_: Nothing()
    kind.device_count = lambda self: 2
    kind.memory_stats = lambda self, *_: {"num_alloc_retries": 0}


HOOKS = {
    "torch.distributed.elastic.agent.server.api": elastic,
    "deepspeed.accelerator.cpu_accelerator": accelerator,
}


class After:
    """Changes some modules after their import."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in HOOKS:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)  # type: ignore[arg-type]
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_change(module: Any) -> None:
            run(module)
            HOOKS[name](module)

        spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, After())  # type: ignore[arg-type]
