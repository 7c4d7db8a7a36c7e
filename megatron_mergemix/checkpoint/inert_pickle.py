"""Read a pickle without importing or calling anything that it names.

The standard unpickler runs what a file tells it to run. Even with ``find_class`` overridden it
can be made to allocate memory out of proportion to the file, through memo indices. This is a
small machine for the few opcodes that pickles in checkpoints consist of. A global is looked up in
the caller's tables and nowhere else; a class becomes an :class:`Inert` record; memory stays
proportional to the size of the file.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

GlobalName = tuple[str, str]
"""Module and qualified name, as they stand in the pickle."""


class RefusedPickle(Exception):
    """The bytes are damaged, or name something that the caller did not allow."""


@dataclass(slots=True, eq=False)
class Inert:
    """What stands for a pickled object: the name of its class and its state, never its code.

    Attributes:
        kind: what the caller's builder names it; from :func:`load_symbols` ``"module name"``.
        state: what the pickle gives it after it is made.
        args: what the pickle makes it from; kept by :func:`load_symbols` only.
        items: what the pickle puts into it, as into an ``OrderedDict``.
    """

    kind: str
    state: Any = None
    args: tuple[Any, ...] = ()
    items: dict[Any, Any] | None = None


@dataclass(frozen=True, slots=True)
class Global:
    """A class, a function or a constant that a pickle names."""

    name: GlobalName
    build: Callable[..., object] | None = field(default=None, compare=False, repr=False)


def load(
    data: bytes,
    values: Mapping[GlobalName, object],
    builders: Mapping[GlobalName, Callable[..., object]],
) -> object:
    """Return the object that ``data`` describes, built of plain containers and ``Inert``.

    Args:
        data: a pickle of protocol 2 to 5.
        values: globals that stand for themselves, such as dtypes.
        builders: globals that the pickle may call or instantiate, and what is called instead.

    Raises:
        RefusedPickle: the bytes are damaged, hold more than one object, use an opcode that
            checkpoints have no use for, or name a global that is in neither table.
    """
    known: dict[GlobalName, object] = dict(values)
    known.update({name: Global(name, build) for name, build in builders.items()})
    return _run(_Machine(data, known.get))


def load_symbols(data: bytes) -> object:
    """Return the object that ``data`` describes, whatever globals it names, all of them inert.

    A global becomes a :class:`Global`, a call of it an :class:`Inert` with its arguments. The
    caller decides which of them it believes.

    Raises:
        RefusedPickle: as :func:`load`, but for unknown globals.
    """
    return _run(_Machine(data, _symbol))


def _symbol(name: GlobalName) -> Global:
    return Global(name, lambda *args: Inert(" ".join(name), None, args))


def _run(machine: _Machine) -> object:
    try:
        return machine.run()
    except (LookupError, TypeError, ValueError) as error:
        size = len(machine.data)
        raise RefusedPickle(f"damaged at byte {machine.position} of {size}") from error


class _Machine:
    """The stack, the marks and the memo of one pickle.

    A handler may fail with LookupError, TypeError or ValueError on damaged input; nothing but
    the caller's builders and methods of built-in containers is ever called.
    """

    def __init__(self, data: bytes, known: Callable[[GlobalName], object | None]) -> None:
        self.data = data
        self.known = known
        self.position = 0
        self.stack: list[Any] = []
        self.outer_stacks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> object:
        data, handlers = self.data, HANDLERS
        while (opcode := data[self.position]) != STOP:
            self.position += 1
            handler = handlers.get(opcode)
            if handler is None:
                raise RefusedPickle(
                    f"opcode {bytes([opcode])!r} at byte {self.position - 1} has no place here"
                )
            handler(self)
        (result,) = self.stack
        if self.outer_stacks or self.position + 1 != len(data):
            raise ValueError("not exactly one object")
        return result

    # ---- reading arguments ----

    def take(self, count: int) -> bytes:
        start, end = self.position, self.position + count
        if count < 0 or end > len(self.data):
            raise ValueError("an argument reaches beyond the end")
        self.position = end
        return self.data[start:end]

    def number(self, width: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def line(self) -> str:
        end = self.data.index(b"\n", self.position)
        text = self.take(end - self.position).decode()
        self.position += 1
        return text

    def pop_to_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.outer_stacks.pop()
        return items

    # ---- opcodes ----

    def protocol(self) -> None:
        if not 2 <= (version := self.number(1)) <= pickle.HIGHEST_PROTOCOL:
            raise RefusedPickle(f"pickle protocol {version} is not one of 2 to 5")

    def frame(self) -> None:
        if self.number(8) > len(self.data) - self.position:
            raise ValueError("a frame reaches beyond the end")

    def mark(self) -> None:
        self.outer_stacks.append(self.stack)
        self.stack = []

    def global_by_lines(self) -> None:
        self.push_global((self.line(), self.line()))

    def global_from_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (type(module) is str and type(name) is str):
            raise TypeError("a global is named by two strings")
        self.push_global((module, name))

    def push_global(self, name: GlobalName) -> None:
        value = self.known(name)
        if value is None:
            raise RefusedPickle(
                f"refused: loading {'.'.join(name)!r} would execute code; no checkpoint needs it"
            )
        self.stack.append(value)

    def call(self) -> None:
        arguments, builder = self.stack.pop(), self.stack.pop()
        if type(builder) is not Global or builder.build is None or type(arguments) is not tuple:
            raise TypeError("only an allowed global can be called")
        self.stack.append(builder.build(*arguments))

    def persistent_id(self) -> None:
        self.stack.append(Inert("persistent id", self.stack.pop()))

    def set_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not Inert or target.state is not None:
            raise TypeError("only a fresh object can be given a state")
        target.state = state

    def put_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Inert:
            if target.items is None:
                target.items = {}
            target = target.items
        if type(target) is not dict or len(flat) % 2:
            raise TypeError("items belong into a dict, in pairs")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            # Hashing a tuple recurses in C, so a deep one would crash the interpreter.
            if type(key) not in KEYS:
                raise TypeError("a key is a plain value or an object")
            target[key] = value

    def append_all(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError("items are appended to a list")
        target.extend(items)

    def push_tuple(self, length: int) -> None:
        if len(self.stack) < length:
            raise LookupError("the stack is too short")
        items = tuple(self.stack[-length:])
        del self.stack[-length:]
        self.stack.append(items)

    def push_text(self, width: int) -> None:
        self.stack.append(self.take(self.number(width)).decode())

    def push_long(self, width: int) -> None:
        size = self.number(width, signed=width == 4)
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


def _push(value: Callable[[_Machine], object]) -> Callable[[_Machine], None]:
    def handler(machine: _Machine) -> None:
        result = value(machine)  # first: a tuple's items leave the stack it is pushed to
        machine.stack.append(result)

    return handler


STOP = pickle.STOP[0]
KEYS = (str, int, float, bool, type(None), Inert, Global)
HANDLERS: dict[int, Callable[[_Machine], None]] = {
    opcode[0]: handler
    for opcode, handler in {
        pickle.PROTO: _Machine.protocol,
        pickle.FRAME: _Machine.frame,
        pickle.MARK: _Machine.mark,
        pickle.GLOBAL: _Machine.global_by_lines,
        pickle.STACK_GLOBAL: _Machine.global_from_stack,
        pickle.REDUCE: _Machine.call,
        pickle.NEWOBJ: _Machine.call,
        pickle.BUILD: _Machine.set_state,
        pickle.BINPERSID: _Machine.persistent_id,
        pickle.SETITEM: lambda m: m.put_items([m.stack.pop(), m.stack.pop()][::-1]),
        pickle.SETITEMS: lambda m: m.put_items(m.pop_to_mark()),
        pickle.APPEND: lambda m: m.append_all([m.stack.pop()]),
        pickle.APPENDS: lambda m: m.append_all(m.pop_to_mark()),
        pickle.TUPLE: _push(lambda m: tuple(m.pop_to_mark())),
        pickle.TUPLE1: lambda m: m.push_tuple(1),
        pickle.TUPLE2: lambda m: m.push_tuple(2),
        pickle.TUPLE3: lambda m: m.push_tuple(3),
        pickle.EMPTY_TUPLE: _push(lambda m: ()),
        pickle.EMPTY_LIST: _push(lambda m: []),
        pickle.EMPTY_DICT: _push(lambda m: {}),
        pickle.NONE: _push(lambda m: None),
        pickle.NEWTRUE: _push(lambda m: True),
        pickle.NEWFALSE: _push(lambda m: False),
        pickle.BININT: _push(lambda m: m.number(4, signed=True)),
        pickle.BININT1: _push(lambda m: m.number(1)),
        pickle.BININT2: _push(lambda m: m.number(2)),
        pickle.BINFLOAT: _push(lambda m: struct.unpack(">d", m.take(8))[0]),
        pickle.SHORT_BINBYTES: _push(lambda m: m.take(m.number(1))),
        pickle.BINBYTES: _push(lambda m: m.take(m.number(4))),
        pickle.LONG1: lambda m: m.push_long(1),
        pickle.LONG4: lambda m: m.push_long(4),
        pickle.SHORT_BINUNICODE: lambda m: m.push_text(1),
        pickle.BINUNICODE: lambda m: m.push_text(4),
        pickle.BINUNICODE8: lambda m: m.push_text(8),
        pickle.MEMOIZE: lambda m: m.remember(len(m.memo)),
        pickle.BINPUT: lambda m: m.remember(m.number(1)),
        pickle.LONG_BINPUT: lambda m: m.remember(m.number(4)),
        pickle.BINGET: _push(lambda m: m.memo[m.number(1)]),
        pickle.LONG_BINGET: _push(lambda m: m.memo[m.number(4)]),
    }.items()
}
