"""Pickles read as data, by a machine that has no way to import or to call anything.

Python's unpickler does what a pickle says. This one knows the opcodes of containers, numbers and strings; a name that a
pickle asks for is looked up in a list, and those on it are *described* (a tensor is a place in a storage), never run.
The argument formats of the opcodes come from the standard library's `pickletools`, which executes nothing.
"""

import codecs
import pickletools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from common.architectures.layers import Shape
from common.errors import CheckpointError

_MOST_OPCODES = 4_000_000  # a state_dict with optimiser state of ResNet-152 has some 50,000
_MOST_AXES = 32
_MARK = object()


@dataclass(frozen=True)
class Named:
    """A global that a pickle asks for, by name; or, for one that is harmless and of no use here, what it would make."""

    name: str


@dataclass(frozen=True, kw_only=True)
class PickledTensor:
    """A tensor as a pickle describes it: a strided view of a storage; offset and strides count elements."""

    storage: Any  # what `persistent` made of it
    offset: int
    shape: Shape
    strides: tuple[int, ...]


_CONTAINERS = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter"}
_TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_PARAMETERS = {
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
    "torch.autograd.variable.Variable",
}
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
# What training scripts keep beside the weights. It is recognised to be skipped.
_HARMLESS = {
    "argparse.Namespace",
    "_codecs.encode",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.ndarray",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "dict", "list", "bytearray")),
    *(f"torch._utils._rebuild_{what}" for what in ("tensor_v3", "qtensor", "sparse_tensor", "meta_tensor_no_storage")),
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch.serialization._get_layout",
}
_TYPES = re.compile(r"torch\.((cuda|storage)\.)?\w+Storage|torch\.(bool|b?float\d+\w*|complex\d+|q?u?int\d+\w*)")
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_KNOWN = _CONTAINERS | _TENSORS | _PARAMETERS | {_SUBCLASS} | _HARMLESS


def read(stream: IO[bytes], persistent: Callable[[Any], Any]) -> Any:
    """The object pickled next in `stream`, which is left behind it. `persistent` describes what is stored elsewhere.

    Raises `CheckpointError` for a damaged pickle, and for one that asks for anything but tensors and plain data.
    """
    return run(stream, Machine(persistent))


def run(stream: IO[bytes], machine: "Machine") -> Any:
    """What `machine` makes of the pickle next in `stream`, which is left behind it. Raises `CheckpointError`."""
    try:
        for count, (name, argument) in enumerate(_operations(stream)):
            if count == _MOST_OPCODES:
                raise CheckpointError(
                    f"its pickle has more than {_MOST_OPCODES} opcodes; plain data never needs as many"
                )
            machine.step(name, argument)
        return machine.result()
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError, AttributeError):
        raise CheckpointError("its pickle is damaged; fetch or make the file again") from None


def _operations(stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """The opcodes of the pickle next in `stream` by name, each with its argument."""
    while True:
        opcode = _OPCODES[stream.read(1)]
        if opcode.name == "STRING":
            # Python 2's text form of bytes; `pickletools` takes it for ASCII.
            quoted = stream.readline().strip()
            if len(quoted) < 2 or quoted[:1] not in (b"'", b'"') or quoted[:1] != quoted[-1:]:
                raise ValueError("a string without its quotes")
            argument: Any = codecs.escape_decode(quoted[1:-1])[0].decode("latin-1")
        else:
            argument = None if opcode.arg is None else opcode.arg.reader(stream)
        yield opcode.name, argument
        if opcode.name == "STOP":
            return


class Machine:
    """The stack and the memo of a pickle; a subclass says what the names it knows stand for."""

    def __init__(self, persistent: Callable[[Any], Any]) -> None:
        """`persistent` describes what is stored elsewhere."""
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._persistent = persistent

    def result(self) -> Any:
        (value,) = self._stack
        return value

    def step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.append(_MARK)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(argument)
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = 0 if name == "EMPTY_TUPLE" else int(name[-1])
                stack.append(tuple(stack.pop() for _ in range(count))[::-1])
            case "TUPLE":
                stack.append(tuple(self._to_mark()))
            case "EMPTY_LIST" | "LIST":
                stack.append([] if name == "EMPTY_LIST" else self._to_mark())
            case "EMPTY_SET" | "FROZENSET":
                stack.append(Named("builtins.set"))
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                filled: dict[Any, Any] = {}
                _set(filled, self._to_mark())
                stack.append(filled)
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [stack.pop()] if name == "APPEND" else self._to_mark()
                if isinstance(stack[-1], list):
                    stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._to_mark()
                _set(stack[-1], items)
            case "GLOBAL" | "STACK_GLOBAL":
                stack.append(self.known(argument.replace(" ", ".", 1) if name == "GLOBAL" else self._joined()))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.made(function, arguments))
            case "BUILD":
                state = stack.pop()
                self.build(stack[-1], state)
            case "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            case _:
                raise CheckpointError(f"its pickle uses the opcode {name}, which plain data never needs; refused")

    def known(self, name: str) -> Named:
        """What stands for a name that the pickle asks for. Raises `CheckpointError` for one that is not known."""
        # Python 2 and 3 have different names for one module.
        if name not in _KNOWN and not _TYPES.fullmatch(name):
            raise refused(name, "Where you trust it, load it with its own library and save model.state_dict() alone")
        return Named(name)

    def made(self, function: Any, arguments: Any) -> Any:
        """What a call would have made, described."""
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise ValueError("a call of what is no name")
        if function.name in _CONTAINERS:
            return _container(arguments)
        if function.name in _TENSORS:
            return _tensor(*arguments)
        if function.name in _PARAMETERS:
            return arguments[0]
        if function.name == _SUBCLASS:
            inner, _, inner_arguments, *_ = arguments
            if inner == function:
                raise ValueError("a subclass of itself")
            return self.made(inner, inner_arguments)
        if function.name == "torch.Size":
            return _counts(arguments[0])
        return function

    def build(self, target: Any, state: Any) -> None:
        """Take the attributes of what was made, as a state_dict's `_metadata`; none matters to the numbers."""

    def _to_mark(self) -> list[Any]:
        """What is above the last mark, which goes too."""
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _joined(self) -> str:
        name, module = self._stack.pop(), self._stack.pop()
        return f"{module}.{name}"


def refused(name: str, advice: str) -> CheckpointError:
    """The error for a pickle that asks for something by a name that is not data."""
    shown = "".join(c if c.isprintable() else "?" for c in name[:80])
    return CheckpointError(f"carries code: asks for {shown}; refused. {advice}")


def _container(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    filled: dict[Any, Any] = {}
    match arguments:
        case ([*pairs],):  # how Python 2 pickles an OrderedDict
            _set(filled, [item for key, value in pairs for item in (key, value)])
        case ({**items},):  # a Counter
            filled |= items
    return filled


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> PickledTensor:
    if len(rest) > 2 and rest[2]:
        raise CheckpointError("a tensor is a lazily negated or conjugated view; save a clone() of it")
    (offset,) = _counts((offset,))
    shape, strides = _counts(shape), _counts(strides)
    if len(shape) != len(strides) or len(shape) > _MOST_AXES:
        raise ValueError("a stride for each axis")
    return PickledTensor(storage=storage, offset=offset, shape=shape, strides=strides)


def _counts(values: Iterable[Any]) -> tuple[int, ...]:
    counts = tuple(values)
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise ValueError("counts are integers that are not negative")
    return counts


def _set(target: Any, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Only keys that are cheap to hash: nested tuples that share their parts would take for ever.
        if not isinstance(key, str | int | float | bytes | None) or (isinstance(key, int) and abs(key) >= 2**64):
            raise CheckpointError("its pickle holds a dictionary with keys that are neither strings nor plain numbers")
        if isinstance(target, dict):
            if key in target:
                shown = "".join(c if c.isprintable() else "?" for c in str(key)[:80])
                raise CheckpointError(f"its pickle sets {shown!r} twice; fetch or make the file again")
            target[key] = value
