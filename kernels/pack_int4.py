"""int4 weights in groups of 128 columns: one plain form, read from GPTQ and AWQ tensors, made at random, dequantised.

The plain form of a matrix [rows, columns] (rows are outputs): nibbles uint8 [rows, columns / 2], column 2 j in the low
nibble of byte j; scales [rows, columns / 128] float16 or bfloat16 as the checkpoint holds them; zeros uint8 of the same
shape, or None where every zero point is 8 (symmetric). A weight is (q - zero) x scale: the zero point is subtracted as
an integer, so it costs no rounding; the product is exact in float32 and is never rounded to 16 bits here.

GPTQ ("gptq", version 1): `qweight` int32 [in / 8, out], eight values along `in`, lowest nibble first; `scales`
[in / 128, out]; `qzeros` int32 [in / 128, out / 8], nibbles along `out`, stored minus one modulo 16; `g_idx` [in], the
group of each input. AWQ ("gemm"): `qweight` int32 [in, out / 8] and `qzeros` int32 [in / 128, out / 8], nibble k
holding column AWQ_ORDER[k]; zero points as they are. Sources: AutoGPTQ's and AutoAWQ's packers; the published Qwen3
checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import KernelError
from . import reference

GROUP = 128
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class Int4Matrix:
    """One matrix, or a stack of them, in the plain form."""

    nibbles: torch.Tensor  # uint8 [..., rows, columns / 2]
    scales: torch.Tensor  # float16 or bfloat16 [..., rows, columns / 128]
    zeros: torch.Tensor | None = None  # uint8 [..., rows, columns / 128], 0..15; None: 8 everywhere

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights, not of the bytes."""
        return (*self.nibbles.shape[:-1], 2 * self.nibbles.shape[-1])

    def __getitem__(self, index: int) -> "Int4Matrix":
        return Int4Matrix(self.nibbles[index], self.scales[index], None if self.zeros is None else self.zeros[index])

    @property
    def device(self) -> torch.device:
        return self.nibbles.device


def from_gptq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None = None
) -> Int4Matrix:
    """GPTQ's four tensors of one linear layer. Raises KernelError for another group size and for `desc_act` (inputs
    whose groups are not in order): those weights need their inputs permuted, expert by expert."""
    in_features, out_features = 8 * qweight.shape[0], qweight.shape[1]
    _check_groups("GPTQ", in_features, out_features, scales, qzeros, out_features // 8)
    if g_idx is not None:
        in_order = torch.arange(in_features, device=g_idx.device, dtype=g_idx.dtype) // GROUP
        if tuple(g_idx.shape) != (in_features,) or not torch.equal(g_idx, in_order):
            raise KernelError(
                "GPTQ weights with desc_act (g_idx out of order) are not supported; "
                "take a checkpoint quantised with desc_act=false"
            )
    q = _nibbles(qweight).permute(0, 2, 1).reshape(in_features, out_features)
    zeros = _nibbles(qzeros).flatten(1) + 1 & 15
    return _plain(q.T, scales.T, None if bool((zeros == 8).all()) else zeros.T)


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> Int4Matrix:
    """AWQ's three tensors of one linear layer; always with zero points, so that all experts have one form."""
    in_features, out_features = qweight.shape[0], 8 * qweight.shape[1]
    _check_groups("AWQ", in_features, out_features, scales, qzeros, qweight.shape[1])
    place = torch.tensor([AWQ_ORDER.index(c) for c in range(8)], device=qweight.device)
    q, zeros = (_nibbles(t)[..., place].flatten(1) for t in (qweight, qzeros))
    return _plain(q.T, scales.T, zeros.T)


def stack_experts(experts: list[tuple[Int4Matrix, Int4Matrix, Int4Matrix]]) -> tuple[Int4Matrix, Int4Matrix]:
    """(gate, up, down) of each expert -> w13 (gate rows first) and w2 of the layer."""
    w13 = [_join([gate, up], torch.cat) for gate, up, _ in experts]
    return _join(w13, torch.stack), _join([down for _, _, down in experts], torch.stack)


def dequantize_int4(w: Int4Matrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(q - zero) x scale, [..., rows, columns]; exact in float32 and float64."""
    q = unpack_nibbles(w.nibbles).to(torch.int16).unflatten(-1, (-1, GROUP))
    zero = 8 if w.zeros is None else w.zeros.to(torch.int16)[..., None]
    return ((q - zero).to(dtype) * w.scales.to(dtype)[..., None]).flatten(-2)


def expert_rows_int4(
    rows: torch.Tensor, ids: torch.Tensor, w13: Int4Matrix, w2: Int4Matrix, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`reference.expert_rows` on int4 weights, dequantised one expert at a time; arithmetic and result in `dtype`."""
    out = torch.zeros(*ids.shape, rows.shape[1], dtype=dtype, device=rows.device)
    for expert in range(w13.shape[0]):
        row, k = (ids == expert).nonzero(as_tuple=True)
        if row.numel():
            gate_up = rows[row].to(dtype) @ dequantize_int4(w13[expert], dtype).T
            out[row, k] = reference.swiglu(gate_up) @ dequantize_int4(w2[expert], dtype).T
    return out


def random_int4(
    num_experts: int,
    hidden: int,
    intermediate: int,
    *,
    device: torch.device | str = "cpu",
    zeros: bool = False,
    seed: int = 3,
) -> tuple[Int4Matrix, Int4Matrix]:
    """w13 and w2 of a layer with random nibbles and scales, standard deviation near 0.02:
    `ExpertLayer(*random_int4(...))`."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def one(rows: int, columns: int) -> Int4Matrix:
        shape, groups = (num_experts, rows, columns // 2), (num_experts, rows, columns // GROUP)
        nibbles = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
        scales = (torch.rand(groups, device=device, generator=generator) * 0.004 + 0.002).half()
        points = torch.randint(5, 12, groups, dtype=torch.uint8, device=device, generator=generator) if zeros else None
        return Int4Matrix(nibbles, scales, points)

    return one(2 * intermediate, hidden), one(hidden, intermediate)


def pack_nibbles(q: torch.Tensor) -> torch.Tensor:
    """uint8 0..15 [..., n] -> uint8 [..., n / 2], the first of two in the low nibble."""
    return q[..., 0::2] | q[..., 1::2] << 4


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., n] -> uint8 [..., n, 8], lowest nibble first."""
    return unpack_nibbles(words.contiguous().view(torch.uint8)).unflatten(-1, (-1, 8))


def _plain(q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> Int4Matrix:
    return Int4Matrix(pack_nibbles(q.contiguous()), scales.contiguous(), None if zeros is None else zeros.contiguous())


def _join(parts: list[Int4Matrix], how: Callable[[list[torch.Tensor]], torch.Tensor]) -> Int4Matrix:
    """Zero points are written out where one part has them."""
    zeros = None
    if any(p.zeros is not None for p in parts):
        zeros = how([p.zeros if p.zeros is not None else torch.full_like(p.scales, 8).byte() for p in parts])
    return Int4Matrix(how([p.nibbles for p in parts]), how([p.scales for p in parts]), zeros)


def _check_groups(
    kind: str, in_features: int, out_features: int, scales: torch.Tensor, qzeros: torch.Tensor, zero_words: int
) -> None:
    groups = in_features // GROUP
    if in_features % GROUP or tuple(scales.shape) != (groups, out_features) or qzeros.shape != (groups, zero_words):
        raise KernelError(
            f"{kind} weights of {in_features} x {out_features}: scales {tuple(scales.shape)} and qzeros "
            f"{tuple(qzeros.shape)} do not fit 4 bits in groups of {GROUP}, expected {(groups, out_features)} "
            f"and {(groups, zero_words)}"
        )
    if scales.dtype not in (torch.float16, torch.bfloat16):
        raise KernelError(f"{kind} scales are {scales.dtype}; the kernels take float16 or bfloat16")
