"""The GPU kernel without a GPU: Triton's interpreter runs it, and its compiler shows what it is."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_mergemix.merge import kernel
from megatron_mergemix.merge.flat import FlatCopies

pytest.importorskip("triton", reason="Triton is for Linux", exc_type=ImportError)

NAME = "megatron_mergemix.merge.gpu_kernel"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, its kernel run by Triton's interpreter on tensors of the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME)


def assert_rounded(found: torch.Tensor, exact: torch.Tensor) -> None:
    """The interpreter cuts bf16 off where a GPU rounds; see the test of what is compiled."""
    steps = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
    bound = steps[found.dtype] * exact.abs() + 1e-6
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_becomes_its_weighted_sum_and_nothing_else_is_written(
    interpreted: ModuleType, dtype: torch.dtype
) -> None:
    buffer = torch.full((30_000,), 7.0, dtype=dtype)
    tile = interpreted.TILE
    own = [torch.zeros(shape, dtype=dtype) for shape in [(1,), (3, 5), (tile,), (100, 133)]]
    views = [buffer[3 : 3 + tile + 1], buffer[16_000 : 16_000 + 2 * tile]]  # one not aligned
    tensors = own + views
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += -(-tensor.numel() // kernel.STEP) * kernel.STEP
    copies = torch.randn(4, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = [0.5, 0.0, 0.75, -0.25]
    copies[1] = torch.nan  # of weight zero: not read
    exact = sum(copies[n].double() * weights[n] for n in (0, 2, 3))
    interpreted.Outputs(tensors, starts, copies).write_sum(weights)
    for tensor, start in zip(tensors, starts, strict=True):
        assert_rounded(tensor.reshape(-1), exact[start : start + tensor.numel()])
    assert bool((buffer[:3] == 7).all())
    assert bool((buffer[3 + tile + 1 : 16_000] == 7).all())
    assert bool((buffer[16_000 + 2 * tile :] == 7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resident_model_is_summed_by_it_and_comes_back_bit_for_bit(
    interpreted: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(kernel, "library", lambda: None)
    monkeypatch.setattr(FlatCopies, "_sum_by_torch", None)
    generator = torch.Generator().manual_seed(1)
    sources = [torch.randn(70, 90, generator=generator).to(dtype) for _ in range(3)]
    sources[1][0, 0] = -0.0
    live = torch.empty(70, 90, dtype=dtype)
    copies = FlatCopies([live], 3, "device", tmp_path, by_triton=True)
    for number, source in enumerate(sources):
        live.copy_(source)
        copies.keep(number)
    copies.write_sum([0.2, 0.3, 0.5])
    parts = zip([0.2, 0.3, 0.5], sources, strict=True)
    assert_rounded(live, sum(weight * source.double() for weight, source in parts))
    copies.write_sum([0.0, 1.0, 0.0])
    assert torch.equal(live, sources[1])
    assert torch.equal(live.signbit(), sources[1].signbit())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compiled_for_a_gpu_it_moves_16_bytes_at_a_time_and_rounds_to_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    gpu_kernel = importlib.import_module(NAME)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed = {"NUM": 5, "TILE": gpu_kernel.TILE, "WHOLE": True, "ALIGNMENT": gpu_kernel.ALIGNMENT}
    types = {
        **dict.fromkeys(("addresses", "starts", "counts"), "*i64"),
        **{"copies": f"*{dtype}", "offsets": "*i64", "weights": "*fp32"},
        **dict.fromkeys(fixed, "constexpr"),
    }
    aligned = {(list(types).index("copies"),): [["tt.divisibility", 16]]}  # as torch allocates
    source = ASTSource(gpu_kernel._weighted_sums, types, fixed, aligned)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    found = Counter(re.findall(r"(?:ld|st)\.global\.\S+|cvt\.rn\S+", compiled.asm["ptx"]))
    size = {"bf16": 2, "fp32": 4}[dtype]
    of_a_thread = gpu_kernel.TILE // (8 * 32) * size // 16
    assert found["ld.global.v4.b32"] == 5 * of_a_thread, "every copy is read once"
    assert found["st.global.v4.b32"] == of_a_thread
    assert not [name for name in found if name.endswith(".b16")]
    if dtype == "bf16":
        assert found["cvt.rn.bf16x2.f32"] > 0


def test_it_is_tried_out_before_it_is_relied_on(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums: list[bool] = []
    launch = interpreted._weighted_sums

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> object:
            def launched(*args: object, **kwargs: object) -> None:
                sums.append(bool(kwargs["WHOLE"]))
                launch[grid](*args, **kwargs)

            return launched

    monkeypatch.setattr(interpreted, "_weighted_sums", Counted())
    interpreted.try_out("cpu")
    assert sorted(sums) == [False, True], "both of its shapes are compiled"


def test_a_sum_that_comes_out_wrong_is_noticed(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreted.Outputs, "write_sum", lambda self, weights: None)
    with pytest.raises(RuntimeError, match="came out otherwise"):
        interpreted.try_out("cpu")


def test_people_are_told_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "find_spec", lambda name: None)
    told = kernel.missing("cuda")
    assert told is not None
    assert "Triton is not installed" in told


def test_people_are_told_when_it_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device_type: str) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC.")

    gpu_kernel = importlib.import_module(NAME)
    monkeypatch.setattr(gpu_kernel, "try_out", fails)
    told = kernel.missing("cuda")
    assert told is not None
    assert re.search("needs a C compiler .*python3-dev.*RuntimeError: Failed to find C", told)
    monkeypatch.setattr(gpu_kernel, "try_out", lambda device_type: None)
    assert kernel.missing("cuda") is None
