"""Payloads in ``_extra_state`` at every layer that is unpickled, and states that are sound."""

from __future__ import annotations

import collections
import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_mergemix.checkpoint.extra_state import check_extra_states
from megatron_mergemix.checkpoint.metadata import read_index
from megatron_mergemix.errors import CheckpointError
from tests.support.checkpoint_family import saved_object
from tests.support.torch_dist import write_checkpoint

ENTRY = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_1"
SCALES = {
    "scale_fwd": torch.ones(3),
    "amax_history_fwd": torch.zeros(4, 2),
    "extra_fp8_variables": {"num_gemms": 1, "lengths": [1, 2.5], "pair": (1, True)},
}


def check(folder: Path, data: bytes) -> None:
    tensors = {"decoder.layers.mlp.linear_fc1.weight": torch.ones(1)}
    write_checkpoint(folder, tensors, objects={ENTRY: data, "rng_state/shard_0_1": b"not ours"})
    check_extra_states(read_index(folder))


def as_bytes(data: bytes) -> torch.Tensor:
    """Return a pickle as TransformerEngine 2 keeps it."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def as_floats(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data + bytes(-len(data) % 4)), dtype=torch.float32)


def recipe() -> object:
    """Return an object that is pickled as a recipe of TransformerEngine is."""
    name = "transformer_engine.common.recipe"
    kind = type("DelayedScaling", (), {"__module__": name})
    module = types.ModuleType(name)
    module.DelayedScaling = kind
    for part in ("transformer_engine", "transformer_engine.common"):
        sys.modules.setdefault(part, types.ModuleType(part))
    sys.modules[name] = module
    value = kind()
    value.margin = 0
    return value


SOUND = {
    "nothing": lambda: [None],
    "no FP8": lambda: [torch.empty(0, dtype=torch.uint8)],
    "a tensor": lambda: [torch.ones(3)],
    "a dict": lambda: [SCALES],
    "an ordered dict": lambda: [collections.OrderedDict(scale=torch.ones(1))],
    "TransformerEngine 1": lambda: [io.BytesIO(saved_object(SCALES))],
    "TransformerEngine 1 without FP8": lambda: [io.BytesIO(saved_object(None))],
    "TransformerEngine 2": lambda: [as_bytes(pickle.dumps(SCALES | {"recipe": recipe()}))],
    "an empty buffer": lambda: [io.BytesIO()],
    "bytes": lambda: [b"extra"],
    "text in bytes": lambda: [as_bytes(b'{"schema": 1}')],
}


@pytest.mark.parametrize("what", SOUND)
def test_states_that_modules_save_are_accepted(tmp_path: Path, what: str) -> None:
    try:
        check(tmp_path, saved_object(SOUND[what]()))
    finally:
        for name in ("", ".common", ".common.recipe"):
            module = sys.modules.get(f"transformer_engine{name}")
            if module is not None and module.__spec__ is None:  # the one of :func:`recipe`
                del sys.modules[f"transformer_engine{name}"]


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch executed",))


class SecondState:
    """A tensor that is harmless until it is given another storage, as ``__setstate__`` does."""

    def __init__(self, shown: torch.Tensor, hidden: torch.Tensor) -> None:
        self.shown, self.hidden = shown, hidden

    def __reduce__(self) -> tuple[object, ...]:
        make, arguments = self.shown.__reduce_ex__(2)
        storage = self.hidden.__reduce_ex__(2)[1][0]
        return make, arguments, (storage, 0, self.hidden.shape, self.hidden.stride())


def nested_storage() -> bytes:
    """Return a pickle whose storage is loaded from bytes that execute."""
    return (
        b"\x80\x04\x8c\rtorch.storage\x8c\x10_load_from_bytes\x93C"
        + bytes([len(pickle.dumps(Payload()))])
        + pickle.dumps(Payload())
        + b"\x85R."
    )


PLANTED = {
    "the state": lambda: [Payload()],
    "around the state": Payload,
    "a dict": lambda: [{"scale": torch.ones(1), "recipe": Payload()}],
    "TransformerEngine 1": lambda: [io.BytesIO(saved_object({"recipe": Payload()}))],
    "a buffer with a plain pickle": lambda: [io.BytesIO(pickle.dumps(Payload()))],
    "TransformerEngine 2": lambda: [as_bytes(pickle.dumps({"recipe": Payload()}))],
    "an old protocol": lambda: [as_bytes(pickle.dumps(Payload(), 0))],
    "after what Python and pickletools read differently": lambda: [
        as_bytes(b"I0x10\n0" + pickle.dumps(Payload(), 0))
    ],
    "a storage of TransformerEngine 2": lambda: [as_bytes(nested_storage())],
    "floats": lambda: [as_floats(pickle.dumps(Payload()))],
    "a part of a tensor": lambda: [as_bytes(b"{" + pickle.dumps(Payload()))[1:]],
    "bytes": lambda: [pickle.dumps(Payload())],
    "a dict that is taken for a list": lambda: {0: as_floats(pickle.dumps(Payload()))},
    "a second storage": lambda: [SecondState(as_bytes(b"{}"), as_bytes(pickle.dumps(Payload())))],
}


@pytest.mark.parametrize("where", PLANTED)
def test_a_planted_payload_is_refused_and_named(tmp_path: Path, where: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        check(tmp_path / "iter", saved_object(PLANTED[where]()))
    message = str(caught.value)
    assert f"__0_0.distcp, entry {ENTRY}: " in message
    assert "Nothing was executed" in message
    assert not (tmp_path / "executed").exists()
    if where in ("the state", "TransformerEngine 2", "bytes"):
        assert "it refers to 'posix.system'" in message


def test_the_payloads_of_these_tests_would_have_been_executed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Megatron Core 0.19 puts a careful one in its place, where another test has imported it.
    monkeypatch.setattr(
        torch.storage,
        "_load_from_bytes",
        lambda data: torch.load(io.BytesIO(data), weights_only=False),
    )
    for data in (pickle.dumps(Payload()), pickle.dumps(Payload(), 0)):
        assert pickle.loads(data) == 0
        (tmp_path / "executed").unlink()
    with pytest.raises(RuntimeError, match="magic number"):  # after the payload was executed
        pickle.loads(nested_storage())
    assert (tmp_path / "executed").exists()
    (hidden,) = torch.load(
        io.BytesIO(saved_object(PLANTED["a second storage"]())), weights_only=False
    )
    assert hidden.numpy().tobytes() == pickle.dumps(Payload())


def two_records() -> bytes:
    data = io.BytesIO(saved_object([None]))
    with zipfile.ZipFile(data, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", pickle.dumps([None], 2))
    return data.getvalue()


def torch_script() -> bytes:
    data = io.BytesIO(saved_object([None]))
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
    return data.getvalue()


FORMS = {
    "an archive behind a pickle": lambda: pickle.dumps(Payload()) + saved_object([None]),
    "an archive before something": lambda: saved_object([None]) + b"x",
    "two pickles in one archive": two_records,
    "an archive of TorchScript": torch_script,
    "no archive": lambda: pickle.dumps([None]),
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("what", FORMS)
def test_bytes_that_readers_may_read_differently_are_refused(tmp_path: Path, what: str) -> None:
    with pytest.raises(CheckpointError, match="torch.save archive"):
        check(tmp_path, FORMS[what]())


def test_a_state_that_holds_itself_is_read_to_an_end(tmp_path: Path) -> None:
    ring: list[object] = []
    ring.append(ring)
    check(tmp_path, saved_object([ring]))


def test_torch_loads_whatever_is_accepted_of_a_damaged_state(tmp_path: Path) -> None:
    """Python's zip reader forgives more than that of torch."""
    good = saved_object([as_bytes(pickle.dumps(SCALES))])
    accepted = 0
    for at in [*range(0, len(good), 29), *range(len(good) - 500, len(good), 2)]:
        data = bytearray(good)
        data[at] ^= 1 << at % 8
        try:
            check(tmp_path, bytes(data))
        except CheckpointError:
            continue
        accepted += 1
        (state,) = torch.load(io.BytesIO(data), weights_only=True)
        assert state.numpy().tobytes() == pickle.dumps(SCALES), at
    assert 20 < accepted < 500
