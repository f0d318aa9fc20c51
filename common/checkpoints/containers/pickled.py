"""Pickles read as data: Python's own unpickler, with a stand-in for whatever a pickle asks for by name.

A pickle can only call what a name in it stands for. Here that is what the reader of a format lists, and nothing else.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, ClassVar

from common.errors import CheckpointError

MOST_BYTES = 2**23  # of a pickle; a state_dict with optimiser state of ResNet-152 has some 300,000
# Opcodes that plain data never needs: BYTEARRAY8 makes as much room as it claims before anything is read, the EXTs ask
# a registry of this process.
_LEFT_OUT = (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4)


@dataclass
class Inert:
    """What stands for a thing that is recognised to be skipped: it may be called and filled, and stays what it is."""

    name: str

    def __call__(self, *arguments: Any) -> "Inert":
        return self

    def skip(self, *arguments: Any) -> None:
        """Take what a pickle puts into a set, a list or an object."""

    add = append = extend = build = __setitem__ = skip


class Data(dict[Any, Any]):
    """A dictionary of a pickle. Raises `CheckpointError` for a key that is there already, or is not plain."""

    def __setitem__(self, key: Any, value: Any) -> None:
        # Only keys that are cheap to hash: nested tuples that share their parts would take for ever.
        if not isinstance(key, str | int | float | bytes | None) or (isinstance(key, int) and abs(key) >= 2**64):
            raise CheckpointError("its pickle holds a dictionary with keys that are neither strings nor plain numbers")
        if key in self:
            raise CheckpointError(f"its pickle sets {shown(key)!r} twice; fetch or make the file again")
        super().__setitem__(key, value)


def shown(name: object) -> str:
    """A name from a file, fit to stand in a line that a person reads."""
    return "".join(c if c.isprintable() else "?" for c in str(name)[:80])


def read(stream: IO[bytes], known: Callable[[str], Any], persistent: Callable[[Any], Any], advice: str) -> Any:
    """The object pickled next in `stream`, which is left behind it.

    `known` gives what a name stands for, and None for what is no data; `persistent` describes what is stored elsewhere.
    Raises `CheckpointError` for a damaged pickle, and one with `advice` for a pickle that asks for what is not known.
    """
    try:
        return _Unpickler(stream, known, persistent, advice).load()
    except CheckpointError:
        raise
    except Exception:  # whatever a damaged pickle makes Python's unpickler or a stand-in stumble over
        raise CheckpointError("its pickle is damaged; fetch or make the file again") from None


# The one in C makes as many places for a memo as a pickle claims to have; this one has a dictionary.
class _Unpickler(pickle._Unpickler):
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self, stream: IO[bytes], known: Callable[[str], Any], persistent: Callable[[Any], Any], advice: str
    ) -> None:
        super().__init__(stream, encoding="latin-1")
        self._known, self._persistent, self._advice = known, persistent, advice

    def find_class(self, module: str, name: str) -> Any:
        found = self._known(f"{module}.{name}")
        if found is None:
            raise CheckpointError(f"carries code: asks for {shown(f'{module}.{name}')}; refused. {self._advice}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent(pid)

    def _empty_dict(self) -> None:
        self.append(Data())

    def _dict(self) -> None:
        items, filled = self.pop_mark(), Data()
        for key, value in zip(items[::2], items[1::2], strict=True):
            filled[key] = value
        self.append(filled)

    def _empty_set(self) -> None:
        self.append(Inert("builtins.set"))

    def _frozen_set(self) -> None:
        self.pop_mark()
        self._empty_set()

    def _build(self) -> None:
        state = self.stack.pop()
        # The state of anything else, as a state_dict's `_metadata`, matters to no number.
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].build(state)

    def _instance(self) -> None:
        raise CheckpointError(f"carries code: makes an instance of a class; refused. {self._advice}")

    dispatch: ClassVar[dict[int, Any]] = {
        **{code: step for code, step in pickle._Unpickler.dispatch.items() if bytes([code]) not in _LEFT_OUT},
        pickle.EMPTY_DICT[0]: _empty_dict,
        pickle.DICT[0]: _dict,
        pickle.EMPTY_SET[0]: _empty_set,
        pickle.FROZENSET[0]: _frozen_set,
        pickle.BUILD[0]: _build,
        pickle.INST[0]: _instance,
        pickle.OBJ[0]: _instance,
        pickle.NEWOBJ[0]: pickle._Unpickler.dispatch[pickle.REDUCE[0]],  # a call like any other
    }
