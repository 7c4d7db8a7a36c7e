from __future__ import annotations

import contextlib
import enum
import io
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path, PosixPath

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType

from megatron_mergemix.checkpoint.index import (
    DTYPE_BYTES,
    BytesEntry,
    Chunk,
    TensorEntry,
    is_model_entry,
)
from megatron_mergemix.checkpoint.metadata import entry_names, read_index
from megatron_mergemix.errors import CheckpointError
from tests.support.torch_dist import saved, write_checkpoint

MODEL = {
    "embedding.word_embeddings.weight": torch.arange(24.0).reshape(8, 3),
    "decoder.layers.mlp.linear_fc1.weight": torch.arange(60).reshape(2, 6, 5).bfloat16(),
    "decoder.final_layernorm.weight": torch.ones(3, dtype=torch.float16),
    "decoder.layers.mlp.router.expert_bias": torch.zeros(2, 4),
}
OPTIMIZER = {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(3)}
OBJECTS = {
    "decoder.layers.mlp._extra_state/shard_0_2": b"state",
    "rng_state/shard_0.0_1.1": b"rng",
    "common_state/shard_0_1": b"args",
}


@pytest.fixture(scope="module")
def written_by_torch(tmp_path_factory):
    """A checkpoint written by torch itself, every tensor in one chunk."""
    folder = tmp_path_factory.mktemp("torch") / "iter_0000007"
    state = {**MODEL, **OPTIMIZER, "scalar": torch.tensor(3), "empty": torch.zeros(0, 3)}
    state |= {name: io.BytesIO(payload) for name, payload in OBJECTS.items()}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, thread_count=2), no_dist=True)
    return folder


def test_a_checkpoint_of_torch_is_read_as_torch_reads_it(written_by_torch):
    index = read_index(written_by_torch)
    expected = dcp.FileSystemReader(written_by_torch).read_metadata()
    assert index.path == written_by_torch
    assert index.iteration == 7
    assert set(index.tensors) | set(index.bytes_entries) == set(expected.state_dict_metadata)
    for name, entry in index.tensors.items():
        stored = expected.state_dict_metadata[name]
        assert entry.shape == tuple(stored.size)
        assert entry.dtype == str(stored.properties.dtype).removeprefix("torch.")
        (chunk,) = entry.chunks
        info = expected.storage_data[MetadataIndex(name, chunk.offsets)]
        assert chunk.sizes == entry.shape
        assert (chunk.file, chunk.file_offset, chunk.length) == (
            info.relative_path,
            info.offset,
            info.length,
        )
    for name, entry in index.bytes_entries.items():
        info = expected.storage_data[MetadataIndex(name)]
        assert entry == BytesEntry(info.relative_path, info.offset, info.length)


def test_chunks_are_the_boxes_that_were_written(tmp_path):
    name = "decoder.layers.mlp.linear_fc1.weight"
    index = read_index(write_checkpoint(tmp_path, MODEL, {name: (2, 3, 1)}))
    size = len(saved(MODEL[name][:1, :2]))
    assert index.tensors[name].chunks[1] == Chunk((0, 2, 0), (1, 2, 5), "__0_0.distcp", 1641, size)
    assert [c.offsets for c in index.tensors[name].chunks] == [
        (layer, row, 0) for layer in (0, 1) for row in (0, 2, 4)
    ]


def test_the_test_writer_writes_what_torch_can_load(tmp_path):
    name = "decoder.layers.mlp.linear_fc1.weight"
    write_checkpoint(tmp_path, MODEL, {name: (2, 4, 2)})
    loaded = {key: torch.empty_like(tensor) for key, tensor in MODEL.items()}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    for key, tensor in MODEL.items():
        assert torch.equal(loaded[key], tensor)


def test_parameters_are_counted_without_optimizer_state(tmp_path):
    index = read_index(write_checkpoint(tmp_path, {**MODEL, **OPTIMIZER}, objects=OBJECTS))
    assert index.num_parameters() == 24 + 60 + 3 + 8
    assert list(index.model_tensors()) == list(MODEL)


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.state.exp_avg.decoder.final_layernorm.weight",
        "optimizer.state.fp32_param.output_layer.weight",
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32)"
        ".bucket_idx_0.exp_avg",
        "chained_1.optimizer.distributed.dp_group_idx_0.param_state/shard_0_1",
        "rng_state/shard_0.0_2.2",
        "vision.rng_state/shard_0.0_2.2",
        "rerun_state_machine_state/shard_0_4",
        "common_state/shard_0_1",
    ],
)
def test_optimizer_random_and_common_state_are_not_the_model(name):
    assert not is_model_entry(name)


@pytest.mark.parametrize(
    "name",
    [
        "embedding.word_embeddings.weight",
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_4",
        "decoder.optimizer.weight",
        "optimizer_like.weight",
        "common_state_encoder.weight",
    ],
)
def test_everything_else_is_the_model(name):
    assert is_model_entry(name)


def test_a_release_has_no_iteration(tmp_path):
    assert read_index(write_checkpoint(tmp_path / "release", MODEL)).iteration is None


def test_sizes_in_bytes_agree_with_torch():
    for name, size in DTYPE_BYTES.items():
        assert getattr(torch, name).itemsize == size
    assert TensorEntry((3, 4), "bfloat16", ()).num_bytes == 24


def test_reading_imports_neither_torch_nor_numpy(written_by_torch):
    code = (
        "import sys; from pathlib import Path\n"
        "from megatron_mergemix.checkpoint import checks, fingerprint, metadata, saves\n"
        "index = metadata.read_index(Path(sys.argv[1])); checks.check_intact(index)\n"
        "fingerprint.fingerprint(index)\n"
        "print({'torch', 'numpy', 'megatron', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, written_by_torch],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")


# ---- what other versions write ----


def simple(**changes):
    """The parts of a correct Metadata with one tensor ``w`` of shape (4, 2) in two chunks."""
    chunks = [ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((2, 2))) for row in (0, 2)]
    tensor = TensorStorageMetadata(TensorProperties(), torch.Size((4, 2)), chunks)
    places = {
        MetadataIndex("w", (0, 0)): _StorageInfo("__0_0.distcp", 0, 100),
        MetadataIndex("w", (2, 0)): _StorageInfo("__0_0.distcp", 100, 100),
    }
    return {"state_dict_metadata": {"w": tensor}, "storage_data": places} | changes


def write(folder, metadata, protocol=4):
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    return folder


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(protocol, tmp_path):
    write(tmp_path, Metadata(**simple()), protocol)
    assert read_index(tmp_path).tensors["w"].shape == (4, 2)


class ByGetattr(pickle.Pickler):
    """Pickles members of enums as Python 3.11.0 to 3.11.3 does, Debian 12's among them."""

    def reducer_override(self, value):
        if isinstance(value, enum.Enum):
            return getattr, (type(value), value.name)
        return NotImplemented


def by_getattr(value, protocol):
    out = io.BytesIO()
    ByGetattr(out, protocol).dump(value)
    return out.getvalue()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_members_of_enums_are_read_as_any_python_writes_them(protocol, tmp_path):
    metadata = Metadata(**simple())
    metadata.all_local_plans = [WriteItemType.SHARD]
    data = by_getattr(metadata, protocol)
    assert b"getattr" in data
    (tmp_path / ".metadata").write_bytes(data)
    assert read_index(tmp_path).tensors["w"].shape == (4, 2)


@pytest.mark.parametrize(
    ("of", "name"),
    [
        (b"posix\nsystem", b"X\x08\0\0\0__call__"),
        (b"torch.distributed.checkpoint.metadata\nMetadata", b"X\x03\0\0\0mro"),
        (b"torch\nfloat32", b"X\x05\0\0\0dtype"),
        (b"torch.distributed.checkpoint.planner\nWriteItemType", b"K\x01"),
    ],
)
def test_nothing_else_is_reached_that_way(of, name, tmp_path):
    taken = b"cbuiltins\ngetattr\nc" + of + b"\n" + name + b"\x86R"
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + taken + b".")
    with pytest.raises(CheckpointError, match="would execute code"):
        read_index(tmp_path)


def test_bookkeeping_of_other_versions_is_read_past(tmp_path):
    metadata = Metadata(**simple())
    metadata.planner_data = OrderedDict(w=("model", 0, "w"))
    metadata.storage_meta = StorageMeta(checkpoint_id=PosixPath("/ckpt/iter_0000003"))
    metadata.all_local_plans = [metadata.state_dict_metadata["w"].chunks]
    write(tmp_path, metadata)
    assert list(read_index(tmp_path).tensors) == ["w"]


def test_a_checkpoint_of_megatron_core_before_0_16_is_read(tmp_path):
    metadata = Metadata(**simple())
    metadata.mcore_data = {"w": {"nd_reformulated_orig_global_shape": (4, 2)}}
    metadata.all_local_plans = [SavePlan([])]
    data = pickle.dumps(metadata, 2)
    for module, name in (("metadata", "Metadata"), ("planner", "SavePlan")):
        theirs = f"cmegatron.core.dist_checkpointing.strategies.torch\nMCore{name}\n"
        ours = f"ctorch.distributed.checkpoint.{module}\n{name}\n"
        assert ours.encode() in data
        data = data.replace(ours.encode(), theirs.encode())
    (tmp_path / ".metadata").write_bytes(data)
    assert read_index(tmp_path).tensors["w"].shape == (4, 2)


# ---- what must not be believed ----


def test_a_payload_among_the_entries_is_refused_and_not_executed(tmp_path):
    planted = tmp_path / "planted"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {planted}",)

    metadata = Metadata(**simple())
    metadata.state_dict_metadata["evil"] = Payload()
    write(tmp_path, metadata)
    with pytest.raises(CheckpointError, match=r"\.metadata: refused: loading 'posix\.system'"):
        read_index(tmp_path)
    assert not planted.exists()


def chunks(*boxes_):
    return [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes_]


def tensor(chunk_list, size=(4, 2), properties=None):
    return TensorStorageMetadata(properties or TensorProperties(), size, chunk_list)


def place(file="__0_0.distcp", offset=0, length=100, **more):
    return {MetadataIndex("w", (0, 0)): _StorageInfo(file, offset, length, **more)}


WHOLE = {"w": tensor(chunks(((0, 0), (4, 2))), torch.Size((4, 2)))}
SPARSE = TensorProperties(layout=torch.sparse_coo)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_dict_metadata": None}, "does not map names"),
        ({"state_dict_metadata": {3: WHOLE["w"]}}, "does not map names"),
        ({"state_dict_metadata": {"w": 3}}, "'w' is neither a tensor nor bytes"),
        ({"state_dict_metadata": {"w": place()}}, "'w' is neither a tensor nor bytes"),
        ({"storage_data": None}, "storage_data is not a dict"),
        ({"storage_data": {}}, "2 chunks but only 0 places"),
        ({"state_dict_metadata": {"b": BytesStorageMetadata()}}, "'b' at None has no place"),
        ({"storage_data": {"w": _StorageInfo("f", 0, 9)}}, "expected a MetadataIndex"),
        ({"storage_data": {MetadataIndex("w", (0, 0)): "f"}}, "expected a _StorageInfo"),
        ({"storage_data": {MetadataIndex(None, (0,)): _StorageInfo("f", 0, 9)}}, "has no name"),
        ({"state_dict_metadata": WHOLE, "storage_data": place(offset=-1)}, "expected a count"),
        ({"state_dict_metadata": WHOLE, "storage_data": place(length=2**64)}, "expected a count"),
        ({"state_dict_metadata": WHOLE, "storage_data": place(length=True)}, "expected a count"),
        ({"state_dict_metadata": WHOLE, "storage_data": place(length=31)}, "31 bytes for"),
        (
            {
                "state_dict_metadata": WHOLE,
                "storage_data": place(transform_descriptors=["stream.zstd"]),
            },
            "compressed",
        ),
        (
            {"state_dict_metadata": {"w": tensor(WHOLE["w"].chunks, (4, 2), SPARSE)}},
            "dense tensor",
        ),
        ({"state_dict_metadata": {"w": tensor(None)}}, "no list of chunks"),
        ({"state_dict_metadata": {"w": tensor([], "42")}}, "expected a shape"),
        ({"state_dict_metadata": {"w": tensor([], (1,) * 65)}}, "at most 64 dims"),
        ({"state_dict_metadata": {"w": tensor([])}}, "0 chunks of 'w' do not tile"),
        (
            {"state_dict_metadata": {"w": tensor(chunks(((0, 0), (2, 2)), ((0, 0), (2, 2))))}},
            "do not tile",
        ),
        (
            {"state_dict_metadata": {"w": tensor(chunks(((0, 0), (2, 2)), ((2, 0), (3, 2))))}},
            "do not tile",
        ),
    ],
)
def test_contradictory_metadata_is_named(changes, message, tmp_path):
    write(tmp_path, Metadata(**simple(**changes)))
    with pytest.raises(CheckpointError, match=message) as error:
        read_index(tmp_path)
    assert str(tmp_path / ".metadata") in str(error.value)


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "../iter_0000001/__0_0.distcp", "a\\b", "..", ".", "", "a\0b", None, 3]
)
def test_a_data_file_outside_the_folder_is_refused(file, tmp_path):
    write(tmp_path, Metadata(**simple(state_dict_metadata=WHOLE, storage_data=place(file))))
    with pytest.raises(CheckpointError, match="not a file name"):
        read_index(tmp_path)


@pytest.mark.parametrize("value", [None, 3, [], {}, "Metadata", StorageMeta()])
def test_a_pickle_of_something_else_is_named(value, tmp_path):
    with pytest.raises(CheckpointError, match="expected a Metadata"):
        read_index(write(tmp_path, value))


def test_many_names_for_one_long_chunk_list_do_not_multiply_the_work(tmp_path):
    shared = tensor(chunks(*(((row, 0), (1, 2)) for row in range(3000))), torch.Size((3000, 2)))
    entries = {f"w{i}": shared for i in range(3000)}
    write(tmp_path, Metadata(**simple(state_dict_metadata=entries)))
    with pytest.raises(CheckpointError, match="9000000 chunks but only 2 places"):
        read_index(tmp_path)


def test_a_missing_metadata_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: No such file"):
        read_index(tmp_path)


def test_oversized_metadata_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_mergemix.checkpoint.metadata.MAX_METADATA_BYTES", 100)
    with pytest.raises(CheckpointError, match="larger than 100 bytes"):
        read_index(write(tmp_path, Metadata(**simple())))


def test_names_are_listed_for_any_format(tmp_path):
    write(tmp_path, Metadata(**simple(storage_data=None)))
    assert entry_names(tmp_path) == ["w"]


def index_or_error(folder: Path, data: bytes) -> None:
    (folder / ".metadata").write_bytes(data)
    with contextlib.suppress(CheckpointError):
        read_index(folder)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_metadata_is_read_or_refused_but_never_crashes(
    data, written_by_torch, tmp_path_factory
):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    original = bytearray((written_by_torch / ".metadata").read_bytes())
    index_or_error(folder, bytes(original[: data.draw(st.integers(0, len(original)))]))
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    index_or_error(folder, bytes(original))


def test_metadata_cut_anywhere_is_refused(written_by_torch, tmp_path):
    original = (written_by_torch / ".metadata").read_bytes()
    for length in range(len(original)):
        (tmp_path / ".metadata").write_bytes(original[:length])
        with pytest.raises(CheckpointError):
            read_index(tmp_path)
