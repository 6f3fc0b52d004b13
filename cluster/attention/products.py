"""Dense products of the GPU engine: as fast as the library has them, or with rows that do not depend on each other.

cuBLAS chooses a kernel by the shape, so a row of `x @ w.T` may change its last bits when other rows come or go. What
holds is that for one shape a row's bits depend on that row and the weights alone, wherever it stands: every row of a
tile is summed in the same order. So the batch-invariant mode makes every product with `ROWS` rows, in pieces; what
stands in rows that nobody asked for is whatever was in memory. The promise is checked on the model's own weights at the
start, and refused where it does not hold. Idea: Thinking Machines' batch-invariant kernels; the fixed piece is
`numerics.py`'s, for another library.

Weights that stay fp8 have kernels of our own: `kernels/dense_fp8.py` reads them for few rows as they are,
`dense_w8a8_few.py` and `dense_w8a8.py` multiply more rows in fp8; on GPUs that these are not for, the library does in
bf16. A row's bits depend on no other in the first two, so the batch-invariant mode takes one of them for all."""

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.nn.functional as F

from ...errors import ConfigError
from ...kernels.dense_fp8 import MAX_ROWS as MOST_FP8_ROWS
from ...kernels.dense_fp8 import Fp8Weight, dense_fp8
from ...kernels.dense_w8a8 import dense_w8a8, has_kernel
from ...kernels.dense_w8a8_few import MAX_ROWS as MOST_W8A8_ROWS
from ...kernels.dense_w8a8_few import dense_w8a8_few
from ...kernels.dequantize_fp8 import dequantize_fp8
from ...kernels.thin_linear import MAX_ROWS, takes, thin_linear

ROWS = 128  # a whole tile of the tensor cores
MOST_WIDENED_ROWS = 64  # on GPUs without fp8 products: above, the library's with weights written out cost less
Weight = torch.Tensor | Fp8Weight


class Products(Protocol):
    """x [padded(T), K] and w [N, K] -> x @ w.T [padded(T), N]; the first T rows count."""

    def padded(self, num_rows: int) -> int: ...

    def __call__(self, x: torch.Tensor, w: Weight) -> torch.Tensor: ...


class PlainProducts:
    """The library's kernels, and our own for the few rows at which those leave the memory idle."""

    def padded(self, num_rows: int) -> int:
        return num_rows

    def __call__(self, x: torch.Tensor, w: Weight) -> torch.Tensor:
        if isinstance(w, Fp8Weight):
            return _fp8_product(x, w)
        if x.is_cuda and x.shape[0] <= MAX_ROWS and takes(*w.shape):
            return thin_linear(x, w)
        return F.linear(x, w)


def _fp8_product(x: torch.Tensor, w: Fp8Weight) -> torch.Tensor:
    num_rows = x.shape[0]
    if num_rows <= MOST_FP8_ROWS:
        return dense_fp8(x, w)
    if has_kernel(x.device):
        return dense_w8a8_few(x, w) if num_rows <= MOST_W8A8_ROWS else dense_w8a8(x, w)
    return dense_fp8(x, w) if num_rows <= MOST_WIDENED_ROWS else F.linear(x, dequantize_fp8(w))


class InvariantProducts:
    """A row's bits are the same in any batch."""

    def __init__(self, weights: Iterable[Weight]) -> None:
        """`weights`: one [N, K] of each shape that will be used. ConfigError where this library breaks the promise."""
        for w in weights:
            if not isinstance(w, Fp8Weight) and not _rows_are_independent(w):
                raise ConfigError(
                    "batch_invariant",
                    True,
                    f"off here: rows of a product with K={w.shape[1]}, N={w.shape[0]} depend on the other rows even at "
                    f"{ROWS} rows (torch {torch.__version__}, {torch.cuda.get_device_name(w.device)})",
                )

    def padded(self, num_rows: int) -> int:
        return -(-num_rows // ROWS) * ROWS

    def __call__(self, x: torch.Tensor, w: Weight) -> torch.Tensor:
        if isinstance(w, Fp8Weight):
            return dense_w8a8_few(x, w) if has_kernel(x.device) else dense_fp8(x, w)
        assert x.shape[0] % ROWS == 0, "made with padded(T) rows"
        if x.shape[0] == ROWS:
            return F.linear(x, w)
        out = x.new_empty(x.shape[0], w.shape[0])
        for piece, result in zip(x.split(ROWS), out.split(ROWS), strict=True):
            torch.mm(piece, w.t(), out=result)
        return out


@torch.inference_mode()
def _rows_are_independent(w: torch.Tensor) -> bool:
    """In another order, among other rows and beside rows of NaN every row keeps its bits."""
    generator = torch.Generator(w.device).manual_seed(w.shape[0] * 1_000_003 + w.shape[1])
    x = torch.randn(ROWS, w.shape[1], generator=generator, device=w.device).to(w.dtype)
    expected = F.linear(x, w)
    order = torch.randperm(ROWS, generator=generator, device=w.device)
    alone = torch.full_like(x, torch.nan)
    alone[77] = x[3]
    into = torch.empty_like(expected)
    torch.mm(x, w.t(), out=into)
    return (
        F.linear(x[order], w).equal(expected[order])
        and F.linear(alone, w)[77].equal(expected[3])
        and into.equal(expected)
    )
