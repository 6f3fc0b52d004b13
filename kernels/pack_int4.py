"""int4 weights for the expert kernels: the plain form comes from `quantized.py`; here are the float reference of the
layer, and random weights to measure with."""

import torch

from ..quantized import GROUP, Int4Matrix, dequantize_int4
from . import reference


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
