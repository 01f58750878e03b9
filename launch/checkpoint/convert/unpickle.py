"""Reads the pickles of PyTorch's own checkpoints without running anything in them.

A pickle is a program: it names callables and calls them. Here every allowed name leads to a stand-in of this module,
which only remembers its arguments. Any other name is refused. Nothing of torch is called, no module is imported and no
tensor is made: a tensor becomes an `ArchivedTensor`, which says where its bytes are.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

import torch

from configs.errors import UserError

PICKLE_LIMIT_BYTES = 1 << 30

T = TypeVar("T")
Names = dict[tuple[str, str], Any]  # (module, name) -> the stand-in for it

_STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


def _keep(self: object, state: object) -> NoReturn:
    """A pickle may set the state of any object that it holds. These objects refuse."""
    raise pickle.UnpicklingError("it changes what is not its own")


def _kept(kind: type[T]) -> type[T]:
    """The class, whose objects keep their state. Set afterwards: Python before 3.11.4 overwrites a __setstate__ in the
    body of a frozen dataclass with slots."""
    kind.__setstate__ = _keep  # type: ignore[attr-defined]
    return kind


@_kept
@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes in an archive: the record `data/<key>`. `dtype` None: untyped."""

    key: str
    dtype: torch.dtype | None
    nbytes: int


@_kept
@dataclass(frozen=True, slots=True)
class ArchivedTensor:
    """A tensor as a view of a storage. `offset` and `stride` count elements. The view lies inside its storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Elements of the storage from the tensor's first to its last."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if self.numel else 0


class _Sealed(type):
    """A pickle can set attributes of any class that it holds. These classes refuse."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError("it sets an attribute of a type")


class Record(metaclass=_Sealed):
    """A plain object of a known class, with the attributes or the state that the pickle gave it."""

    __slots__ = ("state",)

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """The attribute of this name; None when there is none."""
        state = getattr(self, "state", None)  # no `state`: the object was never called
        return state.get(name) if isinstance(state, dict) else None


class _Dict(dict[Any, Any], metaclass=_Sealed):
    """An ordered dict. Its attributes (a state dict's `_metadata`) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


def record_type(name: str) -> type[Record]:
    """A new class for each class that gets a stand-in."""
    return cast(type[Record], _Sealed(name, (Record,), {"__slots__": ()}))


@_kept
@dataclass(frozen=True, slots=True)
class _Call:
    """A callable that a pickle may name."""

    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


@_kept
@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: torch.dtype | None


@_kept
@dataclass(frozen=True, slots=True)
class _TensorType:
    pass


@_kept
@dataclass(frozen=True, slots=True)
class Enumeration:
    """Stands in for an enum of whole numbers. A pickle calls the enum with a number. A pickle of Python before 3.11.4
    calls `getattr(the enum, name)` instead."""

    members: tuple[tuple[str, int], ...]

    def __call__(self, value: Any) -> int:
        if type(value) is not int or value not in dict(self.members).values():
            raise pickle.UnpicklingError(f"no member of an enum: {str(value)[:80]}")
        return value


def _member(kind: Any, name: Any) -> int:
    """A member of an enum that we know: the only use of `getattr` allowed. Python's own getattr is never called."""
    if not isinstance(kind, Enumeration) or not isinstance(name, str) or name not in dict(kind.members):
        raise pickle.UnpicklingError(f"it asks for an attribute, {str(name)[:80]}")
    return dict(kind.members)[name]


def stand_in(function: Callable[..., Any]) -> Any:
    """The stand-in for a callable that a pickle may name. It calls `function` with the pickle's arguments."""
    return _Call(function)


def _ints(values: Any) -> tuple[int, ...]:
    found = tuple(values)
    if len(found) > 64 or not all(type(n) is int and 0 <= n < 1 << 62 for n in found):
        raise pickle.UnpicklingError(f"not a list of sizes: {str(found)[:80]}")
    return found


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: Any, extra: Any) -> ArchivedTensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor without a storage or a dtype")
    if extra:
        raise pickle.UnpicklingError(f"a tensor with {str(extra)[:80]}")
    (start,), shape, strides = _ints((offset,)), _ints(size), _ints(stride)
    if len(shape) != len(strides):
        raise pickle.UnpicklingError(f"strides {strides} for shape {shape}")
    found = ArchivedTensor(storage, dtype, start, shape, strides)
    if found.numel and (start + found.span) * dtype.itemsize > storage.nbytes:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} leaves its storage of {storage.nbytes} bytes")
    return found


def _rebuild_v2(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, extra: Any = None
) -> ArchivedTensor:
    return _tensor(storage, offset, size, stride, getattr(storage, "dtype", None), extra)


def _rebuild_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, extra: Any = None
) -> ArchivedTensor:
    return _tensor(storage, offset, size, stride, dtype, extra)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes of its own. They are dropped."""
    if not isinstance(function, _Call) or not isinstance(kind, _TensorType):
        raise pickle.UnpicklingError("a tensor of an unknown class")
    return function(*arguments)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes, in the form that protocol 2 writes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes of an unknown encoding")
    return text.encode("latin1")


def _nothing(*_: Any) -> None:
    return None


def _names() -> Names:
    """The names that an archive's pickle may use. Made anew each time: no pickle can change another's names."""
    names: Names = {
        ("collections", "OrderedDict"): _Sealed("Dict", (_Dict,), {"__slots__": ()}),
        ("torch", "Size"): _Call(_ints),
        ("torch", "device"): _Call(_nothing),
        ("torch", "Tensor"): _TensorType(),
        ("torch.nn.parameter", "Parameter"): _TensorType(),
        ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_v2),
        ("torch._utils", "_rebuild_tensor_v3"): _Call(_rebuild_v3),
        ("torch._utils", "_rebuild_parameter"): _Call(_rebuild_parameter),
        ("torch._utils", "_rebuild_parameter_with_state"): _Call(_rebuild_parameter),
        ("torch._tensor", "_rebuild_from_type_v2"): _Call(_rebuild_from_type),
        ("torch.storage", "UntypedStorage"): _StorageType(None),
        ("torch.serialization", "_get_layout"): _Call(_nothing),
        ("torch", "strided"): None,
        ("_codecs", "encode"): _Call(_encode),
        ("builtins", "getattr"): _Call(_member),
    }
    names |= {("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()}
    return names | {("torch", name): dtype for name, dtype in _DTYPES.items()}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, names: Names) -> None:
        super().__init__(file)
        self._known = names

    def find_class(self, module: str, name: str) -> Any:
        module = {"copy_reg": "copyreg", "__builtin__": "builtins"}.get(module, module)
        if (module, name) not in self._known:
            raise Refused(f"it wants {module}.{name}, which no tensor needs")
        return self._known[module, name]

    def persistent_load(self, what: Any) -> Storage:
        if not isinstance(what, tuple) or len(what) != 5 or what[0] != "storage":
            raise pickle.UnpicklingError(f"an unknown reference {str(what)[:80]}")
        _, kind, key, _, count = what
        if not isinstance(kind, _StorageType) or not isinstance(key, str):
            raise pickle.UnpicklingError("a storage of an unknown type")
        (count,) = _ints((count,))
        return Storage(key, kind.dtype, count * (kind.dtype.itemsize if kind.dtype else 1))


class Refused(pickle.UnpicklingError):
    """A name that is not allowed."""


def unpickle(where: str, content: bytes, more: Names | None = None) -> Any:
    """The object in a pickle, made of plain Python objects, `ArchivedTensor` and stand-ins.

    `more`: further names that the pickle may use. Raises UserError, which names `where`, for a name that is not allowed
    and for bytes that are no pickle."""
    try:
        return _Unpickler(io.BytesIO(content), _names() | (more or {})).load()
    except Refused as error:
        raise UserError(f"{where}: refused, nothing of it was run: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: not a pickle of a checkpoint: nested too deep") from None
    except MemoryError:
        raise UserError(f"{where}: not a pickle of a checkpoint: it asks for too much memory") from None
    except Exception as error:  # noqa: BLE001 - a damaged or hostile pickle may raise any error
        text = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{where}: not a pickle of a checkpoint: {type(error).__name__}: {text}") from None
