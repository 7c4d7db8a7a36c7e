"""Write a pickle of plain values and inert objects, without importing what it names.

The standard pickler insists on the classes themselves. Importing those of a checkpoint takes
longer than merging a small one, and those of another program may not be installed.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any

from megatron_mergemix.checkpoint.inert_pickle import Global, Inert

PERSISTENT_ID = "persistent id"
"""Kind of the :class:`Inert` that becomes a persistent id, torch's reference to a storage."""

MAX_BYTES = 1 << 26
"""A small pickle can describe a value that takes more space than there is when written out."""


class _Out(bytearray):
    """A pickle under way, and how long it may become."""

    limit: int


def dumps(value: object, limit: int | None = None) -> bytes:
    """Return a pickle of protocol 2.

    Args:
        value: None, bool, int, float, str, list, tuple, dict, :class:`Global`, or :class:`Inert`
            as :func:`~.inert_pickle.load_symbols` returns it. An object that occurs twice is
            written twice.
        limit: bytes, ``MAX_BYTES`` by default; a value of our own may need more than one that was
            read.

    Raises:
        TypeError: another type of value, or one that is nested too deeply or too long.
    """
    out = _Out(pickle.PROTO + b"\x02")
    out.limit = MAX_BYTES if limit is None else limit
    try:
        _put(out, value)
    except RecursionError:
        raise TypeError("too deeply nested") from None
    return bytes(out + pickle.STOP)


def new(name: str, state: object) -> Inert:
    """Return an object of class ``"module name"``, made without arguments and given ``state``."""
    return Inert(name, state)


def call(name: str, *args: object) -> Inert:
    """Return what the callable ``"module name"`` makes of ``args``."""
    return Inert(name, None, args)


def _put(out: _Out, value: Any) -> None:
    kind = type(value)
    if value is None:
        out += pickle.NONE
    elif kind is bool:
        out += pickle.NEWTRUE if value else pickle.NEWFALSE
    elif kind is int:
        _put_int(out, value)
    elif kind is float:
        out += pickle.BINFLOAT + struct.pack(">d", value)
    elif kind is str:
        text = value.encode("utf-8", "surrogatepass")
        out += pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    elif kind is tuple:
        _put_all(out, pickle.MARK, value, pickle.TUPLE)
    elif kind is list:
        _put_all(out, pickle.EMPTY_LIST + pickle.MARK, value, pickle.APPENDS)
    elif kind is dict:
        flat = [part for item in value.items() for part in item]
        _put_all(out, pickle.EMPTY_DICT + pickle.MARK, flat, pickle.SETITEMS)
    elif kind is Global:
        out += pickle.GLOBAL + "{}\n{}\n".format(*value.name).encode()
    elif kind is Inert:
        _put_object(out, value)
    else:
        raise TypeError(f"cannot write a {kind.__name__}")


def _put_all(out: _Out, before: bytes, values: Any, after: bytes) -> None:
    if len(out) > out.limit:
        raise TypeError("too long, or the same things again and again")
    out += before
    for value in values:
        _put(out, value)
    out += after


def _put_int(out: _Out, value: int) -> None:
    if -(1 << 31) <= value < 1 << 31:
        out += pickle.BININT + struct.pack("<i", value)
        return
    number = pickle.encode_long(value)
    if len(number) > 255:
        raise TypeError(f"cannot write an integer of {len(number)} bytes")
    out += pickle.LONG1 + bytes([len(number)]) + number


def _put_object(out: _Out, value: Inert) -> None:
    if value.kind == PERSISTENT_ID:
        _put(out, value.state)
        out += pickle.BINPERSID
        return
    module, _, name = value.kind.partition(" ")
    _put(out, Global((module, name)))
    _put(out, value.args)
    # A class with a state is made bare, as copyreg does; a function is called.
    out += pickle.NEWOBJ if value.state is not None and not value.args else pickle.REDUCE
    if value.items is not None:
        flat = [part for item in value.items.items() for part in item]
        _put_all(out, pickle.MARK, flat, pickle.SETITEMS)
    if value.state is not None:
        _put(out, value.state)
        out += pickle.BUILD
