"""The fp8 products' own CUDA code, run on a CPU: fragments, swizzles, shares of CTAs, barriers (`cuda_on_cpu/`).

What it cannot show: memory order, what the copy engine does to bytes in flight, speed. GPUs show that."""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from expertmesh.kernels import reference
from expertmesh.kernels.dense_fp8 import FewRowsPlan, Fp8Weight, outputs_of_slice, pack_fp8, unpack_fp8
from expertmesh.kernels.dense_w8a8 import stages_for
from expertmesh.kernels.dense_w8a8_few import SlicePlan
from expertmesh.kernels.pack import swizzle

COMPILER = shutil.which("g++")
HERE = Path(__file__).resolve().parent / "cuda_on_cpu"
KERNELS = Path(__file__).resolve().parent.parent / "kernels"
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    for name in (
        "dense_fp8.cu",
        "dense_w8a8.cu",
        "dense_w8a8_few.cu",
        "e4m3.cuh",
    ):  # beside no real ring.cuh, which would be found first
        shutil.copy(KERNELS / name, folder)

    @functools.cache
    def build(*defines):
        out = folder / ("_".join(defines) + ".so")
        flags = [
            "-std=c++17",
            "-O2",
            "-shared",
            "-fPIC",
            "-w",
            f"-I{HERE}",
            f"-I{folder}",
            *(f"-D{d}" for d in defines),
        ]
        subprocess.run([COMPILER, *flags, str(HERE / "dense.cpp"), "-o", str(out)], check=True)
        return ctypes.CDLL(str(out))

    return build


def weight_of(num_outputs, k) -> Fp8Weight:
    raw = torch.randint(0, 254, (num_outputs, k), dtype=torch.uint8)
    raw += raw >= 0x7F  # every byte but NaN
    return pack_fp8(raw.view(torch.float8_e4m3fn), torch.rand(num_outputs // 128, k // 128) * 1e-3 + 1e-6)


def run(library, num_ctas, backwards, w, inputs, num_rows, *more):
    """bf16 [num_rows, N], of which nothing is left unwritten."""
    out = torch.full((num_rows, w.shape[0]), torch.nan, dtype=torch.bfloat16)
    arguments = [num_ctas, backwards, w.packed, w.scales, *inputs, num_rows, out, w.shape[0], *more]
    library.run(
        *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_longlong(a) for a in arguments)
    )
    return out


def quantized(x, capacity):
    """As `quantize_rows.cu` lays it out, and what it stands for; NaN in rows that are not there."""
    num_rows, k = x.shape
    values, scales = reference.quantize_fp8(x)
    packed = torch.full((k // 128, capacity, 128), 0x7F, dtype=torch.uint8)
    packed[:, :num_rows] = values.view(torch.uint8).view(num_rows, -1, 128).transpose(0, 1)
    row_scales = torch.full((k // 128, capacity), torch.nan)
    row_scales[:, :num_rows] = scales.T
    packed = swizzle(packed.view(-1, capacity, 8, 16)).contiguous()
    return packed, row_scales, reference.dequantize_fp8(values, scales, dtype=torch.float64)


def exact(w):
    return reference.dequantize_blocks(*unpack_fp8(w), dtype=torch.float64)


def assert_is(got, expected):
    """float32 sums, rounded once."""
    difference = (got.double() - expected).abs()
    assert bool((difference <= 2**-8 * expected.abs() + 1e-5 * expected.square().mean().sqrt()).all())


def few_rows(plan, k):
    return [f"K={k}", *(f"{name}={value}" for name, value in plan.defines.items())]


@pytest.mark.parametrize(("num_rows", "num_ctas"), [(1, 3), (1, 48), (8, 5), (8, 7), (11, 3), (11, 5), (11, 48)])
def test_few_rows_are_multiplied_by_the_exact_weights(library, num_rows, num_ctas):
    """Slices of 8 to 128 outputs, in one row of blocks or two, in whole sixteens or not."""
    w, x = weight_of(384, 512), torch.randn(num_rows, 512).bfloat16()
    plan = FewRowsPlan.choose(num_rows, outputs_of_slice(384, num_ctas), 512, (9, 0))
    got = run(library(*few_rows(plan, 512)), num_ctas, False, w, [x], num_rows)
    assert_is(got, x.double() @ exact(w).T)


def test_a_rows_bits_do_not_depend_on_their_number(library):
    w, x = weight_of(256, 1024), torch.randn(16, 1024).bfloat16()

    def product(num_rows):
        plan = FewRowsPlan.choose(num_rows, outputs_of_slice(256, 4), 1024, (9, 0))
        return run(library(*few_rows(plan, 1024)), 4, False, w, [x[:num_rows].contiguous()], num_rows)

    assert torch.equal(product(5), product(16)[:5])


@pytest.mark.parametrize(("num_rows", "num_ctas"), [(3, 3), (3, 48), (17, 3), (17, 48), (64, 5), (100, 5)])
def test_some_rows_are_multiplied_in_fp8(library, num_rows, num_ctas):
    w, x = weight_of(384, 512), torch.randn(num_rows, 512).bfloat16()
    plan = SlicePlan.choose(num_rows, outputs_of_slice(384, num_ctas), 512)
    *inputs, dequantized = quantized(x, (num_rows + 7) // 8 * 8)
    got = run(library("FEW", *few_rows(plan, 512)), num_ctas, False, w, inputs, num_rows)
    assert_is(got, dequantized @ exact(w).T)


@pytest.mark.parametrize("tile", [128, 192])
@pytest.mark.parametrize(("num_rows", "num_ctas"), [(1, 5), (130, 132)])
def test_many_rows_are_multiplied_in_fp8(library, tile, num_rows, num_ctas):
    """Whole tiles in turn, the rest shared, also by more CTAs than there are blocks; in any order of CTAs."""
    compiled = library("MANY", "K=512", f"TILE={tile}", f"STAGES={stages_for(tile)}")
    w, x = weight_of(256, 512), torch.randn(num_rows, 512).bfloat16()
    capacity = -(-num_rows // tile) * tile
    *inputs, dequantized = quantized(x, capacity)
    partial = torch.full((2 * num_ctas * 128 * tile,), torch.nan)  # nothing is read before it is written
    more = (capacity, partial, w.counters)
    got = [run(compiled, num_ctas, backwards, w, inputs, num_rows, *more) for backwards in (0, 1)]
    assert_is(got[0], dequantized @ exact(w).T)
    assert torch.equal(got[0], got[1])
    assert not w.counters.any()
