"""Matrix products whose rows do not depend on each other: what makes output independent of the batch on CPU.

A BLAS picks its kernel by shape, so a row of `x @ w.T` may change its last bits when other rows come or go. What
holds (measured, and checked again on every machine at start-up) is: on **one thread**, with K and N fixed and **at
least `min_rows` rows**, a row's bits depend on that row and the weights alone: not on the number of rows, on the
row's place, nor on the number of products in a batched call. So batch-invariant mode pads few rows up to
`min_rows`, cuts many rows into pieces of at most `MAX_ROWS`, and never lets K or N depend on the batch.
`select_numerics` tests every (K, N) that the model will use, takes the smallest `min_rows` that holds for all, and
refuses the mode where none does.

The transposed form (w @ x.T) reads a large w up to 2.5 times faster at 4 to 8 rows, but is another kernel with other
bits below 12 rows (AVX2), so invariant mode cannot use it: that, and the padding, is what the mode costs.

Elementwise functions are exact per element except where a library ends a vector loop with a scalar version of
another rounding (`silu` on widths that are no multiple of the vector): `silu_mul` avoids those. Idea: Thinking
Machines' batch-invariant kernels; the padding is the CPU's version of a fixed tile."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from .errors import ConfigError

MIN_ROWS_CANDIDATES = (4, 8, 16, 32)
MAX_ROWS = 256  # pieces of a long product; every row count up to it is covered by the self-test's sample
WIDE_COLUMNS = 16384  # pieces of a wide product
_SELF_TEST_FLOP = 4e9  # bound of work spent on one (K, N)


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """How products are done. `min_rows` 1 and `batch_invariant` False is the plain, fast mode."""

    batch_invariant: bool = False
    min_rows: int = 1

    def linear(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """x [M, K], w [N, K] -> [M, N] = x @ w.T."""
        num_rows = x.shape[0]
        if not self.batch_invariant:
            return _product(x, w)
        if num_rows < self.min_rows:
            return _product(pad_rows(x, self.min_rows), w)[:num_rows]
        if num_rows <= MAX_ROWS:
            return _product(x, w)
        out = x.new_empty(num_rows, w.shape[0])
        for start in range(0, num_rows, MAX_ROWS):
            start = min(
                start, num_rows - MAX_ROWS
            )  # the last piece reaches back over done rows rather than being short
            out[start : start + MAX_ROWS] = _product(x[start : start + MAX_ROWS], w)
        return out

    def batched_linear(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """x [B, M, K], w [B, N, K] -> [B, M, N]; the caller keeps min_rows <= M <= MAX_ROWS."""
        return torch.bmm(x, w.transpose(1, 2))


def _product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x @ w.T; a very wide one (the head) in fixed column pieces on several threads, each of one thread's arithmetic:
    the pieces are the same whatever the number of threads, so the bits are too."""
    num_columns = w.shape[0]
    if num_columns < 2 * WIDE_COLUMNS or x.device.type != "cpu":
        return F.linear(x, w)
    out = x.new_empty(x.shape[0], num_columns)

    def piece(start: int) -> None:
        with torch.inference_mode():  # a thread of its own has a mode of its own
            torch.mm(x, w[start : start + WIDE_COLUMNS].t(), out=out[:, start : start + WIDE_COLUMNS])

    pool = _column_pool()
    for _ in (map if pool is None else pool.map)(piece, range(0, num_columns, WIDE_COLUMNS)):
        pass  # raises what a piece raised
    return out


@cache
def _column_pool() -> ThreadPoolExecutor | None:
    """Threads for wide products, made at the first one; None where there is one core."""
    num_threads = min(8, len(os.sched_getaffinity(0)))
    if num_threads == 1:
        return None
    return ThreadPoolExecutor(num_threads, "expertmesh-columns", initializer=torch.set_num_threads, initargs=(1,))


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2 * I] (gate first) -> silu(gate) * up [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.shape[-1] % 64 == 0:  # whole vectors on any CPU
        return F.silu(gate).mul_(up)
    return gate / (1.0 + torch.exp(-gate)) * up


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, float32 inside, rounded to x's dtype before the weight as the reference does."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def pad_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """x [M, K] -> [num_rows, K], zeros below."""
    padded = x.new_zeros(num_rows, x.shape[1])
    padded[: x.shape[0]] = x
    return padded


def select_numerics(
    *,
    batch_invariant: bool,
    linear_shapes: Iterable[tuple[int, int]],
    batched_shapes: Iterable[tuple[int, int]] = (),
    device: torch.device | str = "cpu",
) -> Numerics:
    """The mode for this process, after the self-test. Shapes are (K, N). Refuses with ConfigError where the promise
    cannot be kept here."""
    if not batch_invariant:
        return Numerics()
    if torch.device(device).type != "cpu":
        raise ConfigError(
            "batch_invariant", True, f"off on {device}: only a CPU mode exists; set batch_invariant=false"
        )
    if torch.get_num_threads() != 1:
        raise ConfigError(
            "batch_invariant",
            True,
            f"one torch thread per process, {torch.get_num_threads()} are set: call set_num_threads(1)",
        )
    min_rows = 1
    for shapes, check in ((linear_shapes, _linear_holds), (batched_shapes, _batched_holds)):
        for k, n in sorted({piece for shape in shapes for piece in _pieces(*shape)}):
            min_rows = max(min_rows, _smallest_that_holds(check, k, n))
    return Numerics(batch_invariant=True, min_rows=min_rows)


def _pieces(k: int, n: int) -> set[tuple[int, int]]:
    """The shapes that `_product` makes of (K, N)."""
    return {(k, n)} if n < 2 * WIDE_COLUMNS else {(k, WIDE_COLUMNS), (k, n % WIDE_COLUMNS or WIDE_COLUMNS)}


_TESTED: dict[tuple[str, int, int], int] = {}  # (check, K, N) -> min_rows found in this process


def _smallest_that_holds(check: Callable[[int, int, int], bool], k: int, n: int) -> int:
    key = (check.__name__, k, n)
    if key not in _TESTED:
        found = next((rows for rows in MIN_ROWS_CANDIDATES if check(k, n, rows)), 0)
        if not found:
            raise ConfigError(
                "batch_invariant",
                True,
                f"off on this machine: rows of a product with K={k}, N={n} change with the batch even at "
                f"{MIN_ROWS_CANDIDATES[-1]} rows (torch {torch.__version__}, "
                f"{torch.backends.cpu.get_cpu_capability()}); set batch_invariant=false",
            )
        _TESTED[key] = found
    return _TESTED[key]


def _row_counts(k: int, n: int, min_rows: int) -> list[int]:
    """Row counts to try: all small ones, then a sample up to MAX_ROWS, as far as the work allows."""
    counts = [*range(min_rows, min_rows + 14), 31, 32, 33, 48, 63, 65, 100, 128, 193, 255]
    tried: list[int] = []
    flop = 2.0 * MAX_ROWS * k * n
    for count in sorted({c for c in counts if c >= min_rows}):
        flop += 2.0 * count * k * n
        if tried and flop > _SELF_TEST_FLOP:
            break
        tried.append(count)
    return tried


def _linear_holds(k: int, n: int, min_rows: int) -> bool:
    generator = torch.Generator().manual_seed(k * 1_000_003 + n)
    x, w = torch.randn(MAX_ROWS, k, generator=generator), torch.randn(n, k, generator=generator)
    whole = F.linear(x, w)
    for count in _row_counts(k, n, min_rows):
        start = (7 * count) % (MAX_ROWS - count + 1)
        part = x[start : start + count]  # in place, and at an aligned address
        if any(not torch.equal(F.linear(rows, w), whole[start : start + count]) for rows in (part, part.clone())):
            return False
    return True


def _batched_holds(k: int, n: int, min_rows: int) -> bool:
    """A row's bits in a batched product are those of the plain product, for any batch size and capacity."""
    generator = torch.Generator().manual_seed(k * 1_000_003 + n)
    num = 5
    x, w = torch.randn(num, 64, k, generator=generator), torch.randn(num, n, k, generator=generator)
    whole = torch.stack([F.linear(a, b) for a, b in zip(x, w)])
    for count in _row_counts(k, n, min_rows):
        if count > 64:
            break
        for batch in (1, 2, num):
            start = (7 * count) % (64 - count + 1)
            part = x[:batch, start : start + count].contiguous()
            if not torch.equal(torch.bmm(part, w[:batch].transpose(1, 2)), whole[:batch, start : start + count]):
                return False
    return True
