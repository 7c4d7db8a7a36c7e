"""What ``_extra_state`` would make Megatron execute when it loads the copy that we write.

A merge copies the ``_extra_state`` entries of the base. Megatron, torch and TransformerEngine
unpickle them in up to three layers: the ``torch.save`` archive around them, the pickle that
TransformerEngine keeps in a tensor of bytes, and the storages in that. Here every layer is read as
inert symbols (see :mod:`.inert_pickle`), and an entry that names anything but what Megatron Core
0.19 itself still unpickles (its ``safe_globals.SafeUnpickler``) is refused: a payload planted in a
base must not travel on in a checkpoint that we signed.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

from megatron_mergemix.checkpoint.archive_writer import STORAGES
from megatron_mergemix.checkpoint.index import DTYPE_BYTES, CheckpointIndex, is_model_entry
from megatron_mergemix.checkpoint.inert_pickle import Global, Inert, RefusedPickle, load_symbols
from megatron_mergemix.checkpoint.reader import CheckpointReader
from megatron_mergemix.errors import CheckpointError

_TENSOR = "torch._utils _rebuild_tensor_v2"
_BYTES = ("_codecs encode", "__builtin__ bytes", "builtins bytes")  # as protocol 2 pickles them
_BUFFER = "_io BytesIO"
_STORAGE = ("torch.storage _load_from_bytes", "megatron.core.safe_globals safe_load_from_bytes")
_RECIPES = (
    *("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"),
    *("NVFP4BlockScaling", "Format", "_FormatHelper", "MMParams", "QParams"),
)
ALLOWED = {
    *(_TENSOR, *_BYTES, _BUFFER, *_STORAGE),
    *("collections OrderedDict", "torch Size", "torch.storage UntypedStorage"),
    *(f"torch {kind}" for kind in (*STORAGES.values(), *DTYPE_BYTES)),
    *(f"transformer_engine.common.recipe {kind}" for kind in _RECIPES),
    "megatron.core.extensions.transformer_engine TEDelayedScaling",
    *("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"),
    *("numpy ndarray", "numpy dtype"),
}
"""Globals that scales, histories and recipes of FP8 consist of."""

_ITEM_BYTES = {f"torch {kind}": DTYPE_BYTES[dtype] for dtype, kind in STORAGES.items()}
_RECORDS = re.compile(
    r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id|data/\d+"
)
_FLAGS = (0, 1 << 3, 1 << 11, 1 << 3 | 1 << 11)  # sizes behind the elements; names in UTF-8
_NAMING = {"GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}
_MAX_LAYERS = 4
_WHY = "loading it would execute that, and no module's state needs it"


class _Refused(Exception):
    """The bytes name what they should not, or cannot be read with certainty."""


def check_extra_states(index: CheckpointIndex) -> None:
    """Check that no bytes entry of the model would execute code when Megatron loads it.

    Raises:
        CheckpointError: names the file, the entry, and what it refers to; or it is damaged.
    """
    reader = CheckpointReader(index)
    seen = set()  # most entries of a checkpoint are the same few bytes
    for name, entry in index.bytes_entries.items():
        if not is_model_entry(name):
            continue
        data = reader.read_bytes(name)
        digest = hashlib.sha256(data).digest()
        if digest in seen:
            continue
        check_extra_state(data, f"{index.path / entry.file}, entry {name}")
        seen.add(digest)


def check_extra_state(archive: bytes, where: str) -> None:
    """Check that one state, as ``torch.save`` writes it, would execute nothing when it is loaded.

    Raises:
        CheckpointError: says ``where`` it lies, and what it refers to; or it is damaged.
    """
    try:
        _check_archive(archive, 0)
    except _Refused as refused:
        raise CheckpointError(
            f"{where}: {refused}. It would travel on in the merged checkpoint. Nothing was "
            "executed; take the checkpoint from its source again, or save the model without it."
        ) from None


def _check_archive(data: bytes, layer: int) -> None:
    """Check what ``torch.load`` would do with ``data``."""
    if layer > _MAX_LAYERS:
        raise _Refused("more archives within archives than any module saves")
    try:
        records = _records(data)
        symbols = load_symbols(records["data.pkl"])
    except RefusedPickle as error:
        raise _Refused(f"its pickle is {error}") from error
    except (zipfile.BadZipFile, struct.error, EOFError, LookupError) as error:
        raise _Refused(f"not a whole torch.save archive ({error})") from error
    except (NotImplementedError, OSError, RuntimeError, ValueError) as error:
        raise _Refused(f"not a torch.save archive ({error})") from error
    _check_symbols(symbols, layer)
    for state in _unpickled_by_modules(symbols):
        content = _elements(state, records) if state.kind == _TENSOR else _encoded(state)
        _check_pickle(content, layer)


def _unpickled_by_modules(symbols: object) -> list[Inert]:
    """Return tensors and bytes that a module may unpickle when it is given this state.

    These are the state itself, which Megatron puts into a list, and every tensor of bytes.
    """
    states: list[object] = [symbols]
    if isinstance(symbols, (list, tuple)):
        states += symbols
    elif isinstance(symbols, dict):
        states.append(symbols.get(0))
    everything = list(_walk(symbols))
    is_wrapped = isinstance(symbols, Inert) and symbols.kind == "collections OrderedDict"
    states += [
        value
        for value in everything
        if isinstance(value, Inert) and value.kind == _TENSOR and (is_wrapped or _is_bytes(value))
    ]
    found = {id(s): s for s in states if isinstance(s, Inert) and s.kind in (_TENSOR, *_BYTES)}
    return list(found.values())


def _is_bytes(tensor: Inert) -> bool:
    match tensor.args:
        case (Inert(state=("storage", Global() as kind, *_)), *_):
            return _ITEM_BYTES.get(" ".join(kind.name), 1) == 1
    return True


def _check_symbols(symbols: object, layer: int) -> None:
    for value in _walk(symbols):
        if isinstance(value, Global) and " ".join(value.name) not in ALLOWED:
            raise _Refused(f"it refers to {'.'.join(value.name)!r}; {_WHY}")
        if not isinstance(value, Inert) or value.kind == "persistent id":
            continue
        if value.kind not in ALLOWED:
            name = value.kind.replace(" ", ".")
            raise _Refused(f"it refers to {name!r}; {_WHY}")
        if value.kind in _BYTES:
            _encoded(value)
        elif value.kind == _BUFFER and (content := _buffered(value)):
            _check_archive(content, layer + 1)
        elif value.kind in _STORAGE:
            _check_storage(value, layer)


def _walk(value: object) -> Iterator[object]:
    """Yield everything that ``value`` consists of, once: a pickle may refer to itself."""
    todo, seen = [value], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, Inert):
            todo += [value.state, *value.args, value.items]
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            todo += value


def _check_pickle(data: bytes, layer: int) -> None:
    """Check what ``pickle.loads`` would do with ``data``, which may be anything."""
    if _names_nothing(data):
        return
    try:
        symbols = load_symbols(data)
    except RefusedPickle as error:
        raise _Refused(f"it holds a pickle that is {error}") from error
    _check_symbols(symbols, layer + 1)


def _names_nothing(data: bytes) -> bool:
    """Say whether an unpickler would end or fail before it looks any global up."""
    try:
        return all(opcode.name not in _NAMING for opcode, _, _ in pickletools.genops(data))
    except ValueError as error:
        # Both fail at a byte that is no opcode. They may differ in what else they accept.
        return str(error).startswith(("at position ", "pickle exhausted"))


def _check_storage(value: Inert, layer: int) -> None:
    """Check a storage as ``torch.save`` wrote it before it wrote archives: five pickles."""
    data = _encoded(value.args[0] if len(value.args) == 1 else None)
    for _ in range(5):
        try:
            end = 1 + max(position or 0 for _, _, position in pickletools.genops(data))
            symbols = load_symbols(data[:end])
        except (RefusedPickle, ValueError) as error:
            raise _Refused(f"a storage is not what torch saves ({error})") from error
        _check_symbols(symbols, layer + 1)
        data = data[end:]


# ---- bytes, in the shapes that pickles give them ----


def _encoded(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Inert) and value.kind in _BYTES and value.state is value.items is None:
        match value.kind, value.args:
            case "_codecs encode", (str() as text, "latin1"):
                return text.encode("latin1", errors="replace")  # of which Python makes an error
            case "__builtin__ bytes" | "builtins bytes", ():
                return b""
    raise _Refused("it holds bytes in a form that Python does not write")


def _buffered(value: Inert) -> bytes:
    match value.state:
        case (content, int(), None) if not value.args and value.items is None:
            return _encoded(content)
    raise _Refused("it holds a BytesIO in a form that Python does not write")


def _elements(tensor: Inert, records: dict[str, bytes]) -> bytes:
    """Return the elements of a tensor in an archive, which must lie in order."""
    match (*tensor.args, tensor.state, tensor.items):
        case (
            Inert(kind="persistent id", state=("storage", Global() as kind, str() as key, *_)),
            int() as offset,
            tuple() as sizes,
            tuple() as strides,
            *_,
            None,
            None,
        ):
            numel = math.prod(sizes)
            natural = tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))
            width: Any = _ITEM_BYTES.get(" ".join(kind.name))
            stored = records.get(f"data/{key}")
            if width and stored is not None and (numel == 0 or strides == natural):
                return stored[offset * width : (offset + numel) * width]
    raise _Refused("its tensor is in a form that modules do not save")


def _records(data: bytes) -> dict[str, bytes]:
    """Return the records of an archive that every reader of archives sees alike."""
    count, position = _directory(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        root = names[0].partition("/")[0] + "/"
        if len(set(names)) < count or not all(name.startswith(root) for name in names):
            raise ValueError("two records of one name, or of two archives")
        for entry in archive.infolist():
            lengths = struct.unpack("<HHH", data[position + 28 : position + 34])
            if lengths != (len(entry.orig_filename.encode()), 0, 0):
                raise ValueError("a directory with more than names")
            position += 46 + lengths[0]
            is_plain = entry.compress_type == zipfile.ZIP_STORED and entry.flag_bits in _FLAGS
            is_file = entry.volume == entry.internal_attr == entry.external_attr == 0
            if not (is_plain and is_file) or entry.compress_size != entry.file_size:
                raise ValueError(f"{entry.filename} is compressed or damaged")
            if not _RECORDS.fullmatch(entry.filename.removeprefix(root)):
                raise ValueError(f"an unknown record {entry.filename!r}")
        return {name.removeprefix(root): archive.read(name) for name in names}


def _directory(data: bytes) -> tuple[int, int]:
    """Return the number of records and the first byte of the directory of ``data``, an archive.

    ``torch.load`` takes what begins otherwise for a plain pickle, and executes that.
    """
    end = len(data) - 22
    if data[:4] != b"PK\3\4" or data[end : end + 8] != b"PK\5\6\0\0\0\0" or data[-2:] != b"\0\0":
        raise ValueError("other bytes before or after it")
    here, count, size, begin = struct.unpack("<HHII", data[-14:-2])
    if data[end - 20 : end - 16] == b"PK\6\7":
        end -= 76
        _, length, _, _, disks, here, count, size, begin = struct.unpack(
            "<4sQHHQQQQQ", data[end : end + 56]
        )
        locator = struct.pack("<IQI", 0, end, 1)
        if data[end : end + 4] != b"PK\6\6" or data[end + 60 : end + 76] != locator:
            raise ValueError("two directories")
        if length != 44 or disks != 0:
            raise ValueError("a directory of another form")
    if here != count or begin + size != end:
        raise ValueError("a directory somewhere else")
    return count, begin
