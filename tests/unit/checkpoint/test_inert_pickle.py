from __future__ import annotations

import contextlib
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mergemix.checkpoint.inert_pickle import Inert, RefusedPickle, load

OK = {("collections", "OrderedDict"): dict, ("tests", "Box"): lambda *a: Inert("Box", a or None)}

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)


def read(data):
    return load(data, {("torch", "float32"): "float32"}, OK)


@given(plain, st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_plain_values_come_back_as_pickle_gives_them(value, protocol):
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("value", [list(range(2000)), "x" * 70000, 10**700])
def test_long_values_come_back(value):
    assert read(pickle.dumps(value)) == value


def test_an_allowed_class_becomes_an_inert_record():
    shared = OrderedDict(a=1)
    assert read(pickle.dumps([shared, shared], 2)) == [{"a": 1}, {"a": 1}]


def test_a_persistent_id_becomes_an_inert_record():
    record = read(b"\x80\x02K\x07Q.")
    assert (record.kind, record.state) == ("persistent id", 7)


class Payload:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (os.system, "touch {}"),
        (eval, "open('{}', 'w')"),
        (exec, "open('{}', 'w')"),
        (subprocess.check_output, "touch {}"),
        (os.mkdir, "{}"),
    ],
)
def test_a_planted_call_is_refused_by_name_and_not_executed(protocol, function, argument, tmp_path):
    planted = tmp_path / "planted"
    data = pickle.dumps(Payload(function, argument.format(planted)), protocol)
    with pytest.raises(RefusedPickle, match=rf"\.{function.__name__}' would execute code"):
        read(data)
    assert not planted.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_method_reached_by_getattr_or_a_dotted_name_is_refused(protocol, tmp_path):
    """Protocols up to 3 pickle it as a call of getattr, protocol 4 as the name Path.touch."""
    planted = tmp_path / "planted"
    with pytest.raises(RefusedPickle, match=r"(getattr|Path\.touch)' would execute code"):
        read(pickle.dumps(Payload(Path.touch, str(planted)), protocol))
    assert not planted.exists()


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("collections", "OrderedDict.__init__"),
        ("collections", "_sys.modules"),
        ("collections.OrderedDict", "fromkeys"),
        ("torch", "float32.__class__"),
        ("tests", ""),
        ("", "tests.Box"),
        ("builtins", "getattr"),
        ("copyreg", "_reconstructor"),
        ("importlib", "import_module"),
    ],
)
def test_a_name_that_only_resembles_an_allowed_one_is_refused(module, name):
    data = b"\x80\x04" + text(module) + text(name) + b"\x93."
    with pytest.raises(RefusedPickle, match="would execute code"):
        read(data)
    with pytest.raises(RefusedPickle, match="would execute code"):
        read(b"c" + module.encode() + b"\n" + name.encode() + b"\n.")


def test_nothing_is_imported():
    with pytest.raises(RefusedPickle):
        read(b"cantigravity\nfly\n.")
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04K\x01K\x02R.",  # call of an integer
        b"\x80\x04" + text("f") + b")R.",  # call of a string
        b"\x80\x04]K\x01b.",  # state for a list
        b"\x80\x04" + b"ctests\nBox\n)R}b}b.",  # a second state
        b"\x80\x04" + b"ctests\nBox\n]R.",  # arguments that are no tuple
        b"\x80\x04K\x01.K\x02.",  # two objects
        b"\x80\x04(K\x01.",  # an open mark
        b"\x80\x04K\x01K\x02.",  # a left-over
        b"\x80\x04h\x00.",  # a memo entry that was never made
        b"\x80\x04}K\x01a.",  # append to a dict
        b"\x80\x04](K\x01K\x02u.",  # items into a list
        b"\x80\x04}(K\x01u.",  # a key without a value
        b"\x80\x04})K\x01s.",  # a tuple for a key
        b"\x80\x04\x85.",  # a tuple from nothing
        b"\x80\x09K\x01.",  # a protocol of the future
        b"\x80\x04(cos\nsystem\no.",  # OBJ
        b"(ios\nsystem\n.",  # INST
        b"\x80\x04\x82\x01.",  # EXT1
        b"\x80\x04\x8c\x02\xff\xff.",  # not UTF-8
        b"",
        b".",
    ],
)
def test_a_malformed_pickle_is_refused(data):
    with pytest.raises(RefusedPickle):
        read(data)


HUGE = [
    b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1),  # LONG4
    b"\x80\x04\x8b" + struct.pack("<i", -1),
    b"\x80\x04\x8d" + struct.pack("<Q", 2**63),  # BINUNICODE8
    b"\x80\x04X" + struct.pack("<I", 2**32 - 1),  # BINUNICODE
    b"\x80\x04\x8e" + struct.pack("<Q", 2**63),  # BINBYTES8
    b"\x80\x05\x96" + struct.pack("<Q", 2**63),  # BYTEARRAY8
    b"\x80\x04\x95" + struct.pack("<Q", 2**63),  # FRAME
    b"\x80\x04Nr" + struct.pack("<I", 2**31 - 1),  # LONG_BINPUT
    b"\x80\x04N" + b"p4294967295\n",  # PUT
]


@pytest.mark.parametrize("data", HUGE)
def test_a_declared_size_is_not_allocated(data):
    """The standard unpickler takes 32 GB for the LONG_BINPUT."""
    tracemalloc.start()
    try:
        with pytest.raises(RefusedPickle):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_deep_nesting_neither_overflows_the_stack_nor_escapes():
    deep = 100_000
    assert isinstance(read(b"\x80\x04)" + b"\x85" * deep + b"."), tuple)
    assert isinstance(read(b"\x80\x04" + b"]" * deep + b"a" * (deep - 1) + b"."), list)
    with pytest.raises(RefusedPickle):  # as a key it would be hashed, in C, by recursion
        read(b"\x80\x04})" + b"\x85" * deep + b"Ns.")


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_end_in_a_value_or_a_refusal(data):
    with contextlib.suppress(RefusedPickle):
        read(b"\x80\x04" + data)
