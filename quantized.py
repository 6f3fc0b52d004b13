"""Quantised linear layers as checkpoints store them: GPTQ, AWQ and fp8 tensors -> plain forms, and their exact weights.

The plain form of int4 weights [rows, columns] (rows are outputs) in groups of 128 columns: nibbles uint8
[rows, columns / 2], column 2 j in the low nibble of byte j; scales [rows, columns / 128] float16 or bfloat16 as
stored; zeros uint8 of the same shape, or None where every zero point is 8 (symmetric). A weight is (q - zero) x scale:
the zero point is subtracted as an integer, so it costs no rounding, and the product is exact in float32.

GPTQ ("gptq", version 1): `qweight` int32 [in / 8, out], eight values along `in`, lowest nibble first; `scales`
[in / 128, out]; `qzeros` int32 [in / 128, out / 8], nibbles along `out`, stored minus one modulo 16; `g_idx` [in], the
group of each input. AWQ ("gemm"): `qweight` int32 [in, out / 8] and `qzeros` int32 [in / 128, out / 8], nibble k
holding column AWQ_ORDER[k]; zero points as they are. fp8: `weight` e4m3 [out, in] and `weight_scale_inv`, one for
each 128x128 block: weight = e4m3 x scale, in spite of the name. Sources: AutoGPTQ's and AutoAWQ's packers; the
published Qwen3 checkpoints."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .errors import KernelError
from .model_config import QUANTIZATION_GROUP

GROUP = QUANTIZATION_GROUP
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


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    values: torch.Tensor  # e4m3 [rows, columns]
    scales: torch.Tensor  # float32 [rows / 128, columns / 128], rounded up


class TensorSource(Protocol):
    """What `checkpoint.py` offers."""

    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def as_stored(
        self, name: str, shape: tuple[int, ...], *, device: torch.device | str = "cpu", meter: Any = None
    ) -> torch.Tensor: ...


def quantized_form(source: TensorSource, base: str) -> str | None:
    """ "gptq", "awq" or "fp8" for the linear layer `base` (a name without ".weight"), None for 16-bit weights."""
    if f"{base}.weight_scale_inv" in source:
        return "fp8"
    if f"{base}.qweight" not in source:
        return None
    return "gptq" if source.shape(f"{base}.qweight")[1] == source.shape(f"{base}.scales")[1] else "awq"


def read_quantized(
    source: TensorSource,
    base: str,
    outputs: int,
    inputs: int,
    *,
    device: torch.device | str = "cpu",
    meter: Any = None,
) -> Int4Matrix | Fp8Matrix:
    """One linear layer [outputs, inputs] in its plain form."""

    def tensor(name: str, *shape: int) -> torch.Tensor:
        return source.as_stored(f"{base}.{name}", shape, device=device, meter=meter)

    form = quantized_form(source, base)
    if form == "fp8":
        blocks = -(-outputs // GROUP), -(-inputs // GROUP)
        return Fp8Matrix(tensor("weight", outputs, inputs), tensor("weight_scale_inv", *blocks).float())
    qzeros, scales = (inputs // GROUP, outputs // 8), (inputs // GROUP, outputs)
    if form == "awq":
        return from_awq(tensor("qweight", inputs, outputs // 8), tensor("qzeros", *qzeros), tensor("scales", *scales))
    g_idx = tensor("g_idx", inputs) if f"{base}.g_idx" in source else None
    qweight = tensor("qweight", inputs // 8, outputs)
    return from_gptq(qweight, tensor("qzeros", *qzeros), tensor("scales", *scales), g_idx)


def dequantize(w: Int4Matrix | Fp8Matrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weights themselves, exact in float32 and float64."""
    if isinstance(w, Int4Matrix):
        return dequantize_int4(w, dtype)
    rows, columns = w.values.shape
    scales = w.scales.to(dtype).repeat_interleave(GROUP, 0)[:rows].repeat_interleave(GROUP, 1)[:, :columns]
    return w.values.to(dtype) * scales


def from_gptq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None = None
) -> Int4Matrix:
    """GPTQ's four tensors of one linear layer, or stacks of them. Raises KernelError for another group size and for
    `desc_act` (inputs whose groups are not in order): those weights need their inputs permuted, expert by expert."""
    in_features, out_features = 8 * qweight.shape[-2], qweight.shape[-1]
    _check_groups("GPTQ", in_features, out_features, scales, qzeros, out_features // 8)
    if g_idx is not None:
        in_order = torch.arange(in_features, device=g_idx.device, dtype=g_idx.dtype) // GROUP
        if g_idx.shape[-1:] != (in_features,) or not bool((g_idx == in_order).all()):
            raise KernelError(
                "GPTQ weights with desc_act (g_idx out of order) are not supported; "
                "take a checkpoint quantised with desc_act=false"
            )
    # A word's eight inputs lie as the plain form wants them: eight nibbles, the first one lowest, of one output.
    nibbles = qweight.mT.contiguous().view(torch.uint8)
    zeros = _nibbles(qzeros).flatten(-2) + 1 & 15
    plain = None if bool((zeros == 8).all()) else zeros.mT.contiguous()
    return Int4Matrix(nibbles, scales.mT.contiguous(), plain)


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> Int4Matrix:
    """AWQ's three tensors of one linear layer, or stacks of them; always with zero points, so that all experts have one
    form."""
    in_features, out_features = qweight.shape[-2], 8 * qweight.shape[-1]
    _check_groups("AWQ", in_features, out_features, scales, qzeros, qweight.shape[-1])
    place = torch.tensor([AWQ_ORDER.index(c) for c in range(8)], device=qweight.device)
    q, zeros = (_nibbles(t)[..., place].flatten(-2) for t in (qweight, qzeros))
    return Int4Matrix(pack_nibbles(q.mT.contiguous()), scales.mT.contiguous(), zeros.mT.contiguous())


def dequantize_int4(w: Int4Matrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(q - zero) x scale, [..., rows, columns]; exact in float32 and float64."""
    q = unpack_nibbles(w.nibbles).to(torch.int16).unflatten(-1, (-1, GROUP))
    zero = 8 if w.zeros is None else w.zeros.to(torch.int16)[..., None]
    return ((q - zero).to(dtype) * w.scales.to(dtype)[..., None]).flatten(-2)


def stack_gate_up(gate: Int4Matrix, up: Int4Matrix) -> Int4Matrix:
    """w13: gate rows first. Zero points are written out where one of them has some."""
    zeros = None
    if gate.zeros is not None or up.zeros is not None:
        both = [m.zeros if m.zeros is not None else torch.full_like(m.scales, 8).byte() for m in (gate, up)]
        zeros = torch.cat(both, -2)
    return Int4Matrix(torch.cat((gate.nibbles, up.nibbles), -2), torch.cat((gate.scales, up.scales), -2), zeros)


def pack_nibbles(q: torch.Tensor) -> torch.Tensor:
    """uint8 0..15 [..., n] -> uint8 [..., n / 2], the first of two in the low nibble."""
    return q[..., 0::2] | q[..., 1::2] << 4


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., n] -> uint8 [..., n, 8], lowest nibble first."""
    return unpack_nibbles(words.contiguous().view(torch.uint8)).unflatten(-1, (-1, 8))


def _check_groups(
    kind: str, in_features: int, out_features: int, scales: torch.Tensor, qzeros: torch.Tensor, zero_words: int
) -> None:
    groups = in_features // GROUP
    expected = (groups, out_features), (groups, zero_words)
    if in_features % GROUP or (tuple(scales.shape[-2:]), tuple(qzeros.shape[-2:])) != expected:
        raise KernelError(
            f"{kind} weights of {in_features} x {out_features}: scales {tuple(scales.shape)} and qzeros "
            f"{tuple(qzeros.shape)} do not fit 4 bits in groups of {GROUP}, expected {expected[0]} "
            f"and {expected[1]}"
        )
    if scales.dtype not in (torch.float16, torch.bfloat16):
        raise KernelError(f"{kind} scales are {scales.dtype}; the kernels take float16 or bfloat16")
