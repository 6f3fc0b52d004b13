"""The CUDA code of attention for few decodes, run on a CPU: clusters, fragments, rings, shares (`cuda_on_cpu/`).

What it cannot show: memory order, what is there before a kernel begins, speed. GPUs show that
(`test_decode_attention_gpu.py`)."""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from decode_world import assert_right, decode_step

COMPILER = shutil.which("g++")
HERE = Path(__file__).resolve().parent / "cuda_on_cpu"
KERNELS = Path(__file__).resolve().parent.parent / "kernels"
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
SHARED = "extern __shared__ __align__(128) u8 ring_memory[];"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_cpu")  # beside no real header that is stood for
    source = (KERNELS / "decode_attention.cu").read_text()
    assert SHARED in source
    for name in ("fragments.cuh", "hopper.cuh"):
        source = source.replace(f'#include "{name}"\n', "")
    (folder / "decode_attention.cu").write_text(source.replace(SHARED, ""))
    for name in ("qk_norm_rope.cuh", "e4m3.cuh"):
        shutil.copy(KERNELS / name, folder)

    @functools.cache
    def build(**defines):
        out = folder / ("_".join(f"{k}{v}" for k, v in defines.items()) + ".so")
        named = [f"-D{name}={value}" for name, value in defines.items()]
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{HERE}", f"-I{folder}", *named]
        subprocess.run([COMPILER, *flags, str(HERE / "decode.cpp"), "-o", str(out)], check=True)
        return ctypes.CDLL(str(out))

    return build


def run(library, step, **sizes):
    defines = {"NUM_HEADS": step.num_heads, "NUM_KV_HEADS": step.num_kv_heads, "HEAD_DIM": step.head_dim}
    compiled = library(**defines, PAGE=step.block_size, KV_FP8=int(step.k.dtype != torch.bfloat16), **sizes)
    arguments = [ctypes.c_float(a) if isinstance(a, float) else ctypes.c_void_p(a.data_ptr()) for a in step.arguments()]
    compiled.run(ctypes.c_int(step.num_rows), *arguments)


@pytest.mark.parametrize(
    ("shape", "share", "lengths"),
    [
        ((32, 4, 128), (8, 4, 4), [1, 17, 200, 0]),
        ((32, 2, 128), (2, 4, 2), [16, 0, 300]),
        ((4, 2, 64), (8, 4, 2), [15, 0, 1200]),
        ((10, 2, 128), (4, 4, 2), [65, 32]),
    ],
    ids=str,
)
def test_any_length_gives_the_references_heads_and_cache(library, shape, share, lengths):
    """Units without a CTA, CTAs without a unit, turns of the ring, borders of pages and units, padding."""
    step = decode_step(lengths, *shape)
    run(library, step, **dict(zip(("CTAS", "WARPS", "STAGES"), share)))
    assert_right(step)


def test_long_rings_many_warps_and_small_pages(library):
    step = decode_step([33, 400, 1], 16, 8, 64, block_size=4)
    run(library, step, CTAS=1, WARPS=8, STAGES=3)
    assert_right(step)
    step = decode_step([129, 64], 16, 8, 64, block_size=64)
    run(library, step, CTAS=4, WARPS=1, STAGES=2)
    assert_right(step)


@pytest.mark.parametrize(("shape", "lengths"), [((24, 2, 128), [300, 1, 0]), ((4, 2, 64), [17, 200])], ids=str)
def test_e4m3_caches_are_widened(library, shape, lengths):
    step = decode_step(lengths, *shape, kv_dtype=torch.float8_e4m3fn)
    run(library, step, CTAS=2, WARPS=4, STAGES=4)
    assert_right(step)


def test_a_request_sees_no_other(library):
    lengths = [70, 0, 33]
    alone, both = decode_step([70], 4, 2, 64), decode_step(lengths, 4, 2, 64)
    both.qkv[0], both.cos_sin = alone.qkv[0], alone.cos_sin
    for mine, theirs in ((alone.pages_of(0), both.pages_of(0)),):
        both.k[theirs], both.v[theirs] = alone.k[mine], alone.v[mine]
    both.qk_norm = alone.qk_norm
    for step in (alone, both):
        run(library, step, CTAS=8, WARPS=4, STAGES=2)
    assert torch.equal(alone.out[0], both.out[0])
