"""`permute_pairs.cu` beside `permute_few.cu`, their own CUDA code, run on a CPU (`cuda_on_cpu/`): the same places,
tiles, counts and blocks for any pairs, and nothing left unwritten that the products read."""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from expertmesh.kernels.permute import FEWEST_TILES

COMPILER = shutil.which("g++")
HERE = Path(__file__).resolve().parent / "cuda_on_cpu"
KERNELS = Path(__file__).resolve().parent.parent / "kernels"
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
UNWRITTEN = 0x55


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("permute")
    for name in ("permute_few.cu", "permute_pairs.cu", "places.cuh"):  # beside no real expert_work.cuh
        shutil.copy(KERNELS / name, folder)

    @functools.cache
    def build(*defines):
        out = folder / ("_".join(defines) + ".so")
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{HERE}", f"-I{folder}"]
        sources = [*(f"-D{d}" for d in defines), str(HERE / "permute.cpp"), "-o", str(out)]
        subprocess.run([COMPILER, *flags, *sources], check=True)
        return ctypes.CDLL(str(out))

    return build


def run(compiled, num_ctas, ids, num_local, tile, granule, x, fp8, expert_map, backwards):
    """Everything that the kernel writes."""
    pairs, hidden = ids.numel(), x.shape[1]
    capacity = (pairs + 7 * min(num_local, pairs) + 7) // 8 * 8
    max_tiles, blocks = max(FEWEST_TILES, pairs // tile + min(num_local, pairs)), hidden // (128 if fp8 else 64)
    shapes = {
        "counts": (num_local,),
        "pair_of_row": (capacity,),
        "tiles": (max_tiles, 4),
        "ready": (max_tiles,),
        "state": (4,),
        "packed": (blocks, capacity, 32),
        "scales": (blocks, capacity),
    }
    out = {name: torch.full(shape, UNWRITTEN, dtype=torch.int32) for name, shape in shapes.items()}
    work, rows = torch.zeros(2, dtype=torch.int64), torch.zeros(num_local, dtype=torch.int64)
    num_mapped = 0 if expert_map is None else expert_map.numel()
    buffers = [out[name] for name in ("counts", "pair_of_row", "tiles", "ready", "state", "packed", "scales")]
    arguments = [num_ctas, backwards, ids, pairs, expert_map, num_mapped, tile, granule, x, capacity]
    compiled.run(*(_argument(a) for a in [*arguments, *buffers, work, rows]))
    return {**out, "work": work, "rows": rows}


def _argument(a):
    if isinstance(a, torch.Tensor):
        return ctypes.c_void_p(a.data_ptr())
    return ctypes.c_void_p(None) if a is None else ctypes.c_longlong(a)


def ids_of(kind, num_rows, top_k, num_ids):
    if kind == "a gate's":
        return torch.stack([torch.randperm(num_ids)[:top_k] for _ in range(num_rows)]).int()
    if kind == "any":
        return torch.randint(-2, num_ids + 3, (num_rows, top_k), dtype=torch.int32)
    if kind == "one expert":
        return torch.full((num_rows, top_k), num_ids - 1, dtype=torch.int32)
    return torch.full((num_rows, top_k), -1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("num_local", "tile", "granule", "hidden", "fp8", "mapped"),
    [(16, 8, 8, 256, 0, 0), (20, 24, 8, 384, 1, 30), (16, 32, 32, 64, 0, 700)],
)
def test_a_cta_a_pair_writes_what_few_ctas_write(library, num_local, tile, granule, hidden, fp8, mapped):
    torch.manual_seed(hidden + tile + mapped)
    top_k = 8
    expert_map = None
    if mapped:
        expert_map = torch.full((mapped,), -1, dtype=torch.int32)
        places = torch.randperm(mapped)[:num_local]
        expert_map[places] = torch.arange(num_local, dtype=torch.int32)
    sizes = [f"NUM_EXPERTS={num_local}", f"HIDDEN={hidden}", f"TOP_K={top_k}", f"FP8={fp8}"]
    few = library(*sizes, "MAX_PAIRS=512")
    pairs = library(*sizes, "PAIRS", f"TILE={tile}")
    for num_rows, kind in ((1, "none local"), (3, "one expert"), (5, "any"), (8, "a gate's")):
        ids = ids_of(kind, num_rows, top_k, mapped or num_local)
        x = torch.randn(num_rows, hidden).bfloat16()
        given = (ids, num_local, tile, granule, x, fp8, expert_map)
        expected, got = run(few, 1, *given, False), run(pairs, ids.numel(), *given, num_rows % 2 == 0)
        for name, wanted in expected.items():
            assert torch.equal(got[name], wanted), name
        assert got["work"][0] == 1
        num_tiles, rows, num_pairs, claimed = got["state"].tolist()
        assert claimed == 0
        assert got["counts"].sum() == got["rows"].sum() == got["work"][1] == num_pairs
        assert (got["pair_of_row"][:rows] >= 0).sum() == got["tiles"][:num_tiles, 2].sum() == num_pairs


def test_rows_of_more_pieces_than_threads(library):
    torch.manual_seed(1)
    sizes = ["NUM_EXPERTS=8", "HIDDEN=2176", "TOP_K=2"]
    given = (ids_of("a gate's", 2, 2, 8), 8, 8, 8, torch.randn(2, 2176).bfloat16(), 0, None, False)
    expected = run(library(*sizes, "FP8=0", "MAX_PAIRS=512"), 1, *given)
    got = run(library(*sizes, "FP8=0", "PAIRS", "TILE=8"), 4, *given)
    assert all(torch.equal(got[name], wanted) for name, wanted in expected.items())
