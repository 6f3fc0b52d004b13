"""`thin_experts.cu` without a GPU: it compiles with nothing spilled."""

import pytest
from compiling import compile_for

from expertmesh.kernels.thin_experts import MOST_PAIRS, takes, thin_experts_kernel


@pytest.mark.parametrize("sizes", [(2048, 768, 128), (4096, 1536, 64), (6144, 2560, 16), (256, 64, 5)], ids=str)
def test_it_compiles(sizes):
    kernel = thin_experts_kernel(*sizes)
    (compiled,) = compile_for(["sm_90a"], kernel.file, kernel.defines)
    assert [use.name for use in compiled.use()] == ["thin_experts"]
    assert all(use.clean for use in compiled.use()), compiled.use()


def test_it_names_the_sizes_it_takes():
    assert all(takes(8, *sizes) for sizes in ((2048, 768), (4096, 1536), (6144, 2560), (128, 64)))
    assert not any(takes(pairs, 2048, 768) for pairs in (0, MOST_PAIRS + 1))
    assert not takes(8, 16384, 16384)
