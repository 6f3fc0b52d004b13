"""The fp8 products' own CUDA code, run on a CPU: fragments, swizzles, shares of CTAs, barriers (`cuda_on_cpu/`).

What it cannot show: memory order, what the copy engine does to bytes in flight, speed. GPUs show that."""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from expertmesh.kernels import reference
from expertmesh.kernels.dense_fp8 import MOST_CTAS, Fp8Weight, pack_fp8, unpack_fp8
from expertmesh.kernels.pack import swizzle

COMPILER = shutil.which("g++")
HERE = Path(__file__).resolve().parent / "cuda_on_cpu"
KERNELS = Path(__file__).resolve().parent.parent / "kernels"
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    for name in ("dense_fp8.cu", "dense_w8a8.cu", "e4m3.cuh"):  # beside no real ring.cuh, which would be found first
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


def run(library, num_ctas, backwards, w, *arguments, rows, tile):
    """bf16 [rows, N], of which nothing is left unwritten, as nothing of the workspaces may be read before."""
    num_outputs, _ = w.shape
    out = torch.full((rows, num_outputs), torch.nan, dtype=torch.bfloat16)
    partial = torch.full((2 * num_ctas * 128 * tile,), torch.nan)
    pointers = [t.data_ptr() if isinstance(t, torch.Tensor) else t for t in (w.packed, w.scales, *arguments, out)]
    library.run(
        num_ctas,
        int(backwards),
        *(ctypes.c_void_p(p) if isinstance(p, int) else p for p in pointers),
        num_outputs,
        ctypes.c_void_p(partial.data_ptr()),
        ctypes.c_void_p(w.counters.data_ptr()),
    )
    assert not w.counters.any()
    assert w.counters.numel() >= MOST_CTAS
    return out


def assert_is(got, expected):
    """float32 sums, rounded once."""
    difference = (got.double() - expected).abs()
    assert bool((difference <= 2**-8 * expected.abs() + 1e-5 * expected.square().mean().sqrt()).all())


@pytest.mark.parametrize("num_ctas", [1, 5, 12])
@pytest.mark.parametrize(("tile", "stages", "rows"), [(8, 6, 3), (16, 5, 16), (32, 4, 17), (64, 3, 33)])
def test_few_rows_are_multiplied_by_the_exact_weights(library, tile, stages, rows, num_ctas):
    """Three tiles of four blocks: whole tiles, two and more CTAs a tile, runs of an odd number of blocks."""
    compiled = library("K=512", f"TILE={tile}", f"STAGES={stages}")
    w, x = weight_of(384, 512), torch.randn(rows, 512).bfloat16()
    expected = x.double() @ reference.dequantize_blocks(*unpack_fp8(w), dtype=torch.float64).T
    got = [run(compiled, num_ctas, back, w, x, ctypes.c_int(rows), rows=rows, tile=tile) for back in (False, True)]
    assert_is(got[0], expected)
    assert torch.equal(got[0], got[1])


def test_a_rows_bits_are_the_same_in_every_variant(library):
    w, x = weight_of(256, 512), torch.randn(64, 512).bfloat16()

    def product(tile, stages, rows):
        return run(
            library("K=512", f"TILE={tile}", f"STAGES={stages}"),
            3,
            False,
            w,
            x[:rows].contiguous(),
            ctypes.c_int(rows),
            rows=rows,
            tile=tile,
        )

    whole = product(64, 3, 64)
    for tile, stages, rows in ((8, 6, 5), (16, 5, 11), (32, 4, 30)):
        assert torch.equal(product(tile, stages, rows), whole[:rows])


@pytest.mark.parametrize(("tile", "stages"), [(128, 6), (192, 5)])
@pytest.mark.parametrize(("rows", "num_ctas"), [(1, 5), (130, 4), (130, 132)])
def test_many_rows_are_multiplied_in_fp8(library, tile, stages, rows, num_ctas):
    """Whole tiles in turn, the rest shared; a tile more CTAs than blocks; rows of padding are NaN."""
    compiled = library("W8A8", "K=512", f"TILE={tile}", f"STAGES={stages}")
    w, x = weight_of(256, 512), torch.randn(rows, 512).bfloat16()
    values, scales = reference.quantize_fp8(x)
    expected = (
        reference.dequantize_fp8(values, scales, dtype=torch.float64)
        @ reference.dequantize_blocks(*unpack_fp8(w), dtype=torch.float64).T
    )
    capacity = -(-rows // tile) * tile
    packed = torch.full((4, capacity, 128), 0x7F, dtype=torch.uint8)
    packed[:, :rows] = values.view(torch.uint8).view(rows, 4, 128).transpose(0, 1)
    packed = swizzle(packed.view(4, capacity, 8, 16)).contiguous()
    row_scales = torch.full((4, capacity), torch.nan)
    row_scales[:, :rows] = scales.T
    arguments = (packed, row_scales, ctypes.c_longlong(capacity), ctypes.c_int(rows))
    got = [run(compiled, num_ctas, back, w, *arguments, rows=rows, tile=tile) for back in (False, True)]
    assert_is(got[0], expected)
    assert np.array_equal(got[0].view(torch.int16).numpy(), got[1].view(torch.int16).numpy())
