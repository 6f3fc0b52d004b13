"""Every operation in plain torch: what the kernels must compute. Runs on CPU and GPU; `dtype` sets the arithmetic.

Written for clarity. `expert_rows` is also the product's path where no kernel exists."""

import torch
import torch.nn.functional as F

E4M3_MAX = 448.0


def gate_topk(logits: torch.Tensor, top_k: int, *, renormalize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over all experts in float32, the `top_k` largest (ties to the lower expert), renormalised.
    logits [num_tokens, num_experts] -> ids int32, weights float32, both [num_tokens, top_k]."""
    probabilities = torch.softmax(logits.float(), dim=-1)
    order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    ids, weights = order.indices[:, :top_k].to(torch.int32), order.values[:, :top_k]
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights


def route(
    ids: torch.Tensor, num_local_experts: int, tile: int, expert_map: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, int]]]:
    """Counts per local expert, pair of each padded row (-1 padding), and tiles (expert, first_row, num_rows), in
    order."""
    flat = local_ids(ids, num_local_experts, expert_map).flatten().tolist()
    rows: list[int] = []
    counts: list[int] = []
    tiles: list[tuple[int, int, int]] = []
    for expert in range(num_local_experts):
        mine = [pair for pair, e in enumerate(flat) if e == expert]
        num_tiles = -(-len(mine) // tile)
        step = _round_up_8(-(-len(mine) // num_tiles)) if num_tiles else 1
        tiles += [(expert, len(rows) + d, min(step, len(mine) - d)) for d in range(0, len(mine), step)]
        counts.append(len(mine))
        rows += mine + [-1] * (_round_up_8(len(mine)) - len(mine))
    return torch.tensor(counts, dtype=torch.int32), torch.tensor(rows, dtype=torch.int32), tiles


def local_ids(ids: torch.Tensor, num_local_experts: int, expert_map: torch.Tensor | None = None) -> torch.Tensor:
    """Local slot of each id through `expert_map` (physical id -> slot, -1 elsewhere); anything else becomes -1."""
    if expert_map is not None:
        inside = (ids >= 0) & (ids < expert_map.numel())
        ids = torch.where(inside, expert_map[ids.clamp(0, expert_map.numel() - 1).long()], torch.full_like(ids, -1))
    return torch.where((ids >= 0) & (ids < num_local_experts), ids, torch.full_like(ids, -1))


def expert_rows(
    rows: torch.Tensor, ids: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """y[r, k] = w2[e] @ (silu(gate) * up) with e = ids[r, k]; zero where ids is -1. [num_rows, top_k, hidden] in
    rows' dtype. `dtype` (float64 for a reference) is the arithmetic's, and the result's when given."""
    compute = dtype or rows.dtype
    out = torch.zeros(*ids.shape, rows.shape[1], dtype=compute, device=rows.device)
    for expert in range(w13.shape[0]):
        row, k = (ids == expert).nonzero(as_tuple=True)
        if row.numel():
            gate_up = rows[row].to(compute) @ w13[expert].to(compute).T
            out[row, k] = swiglu(gate_up) @ w2[expert].to(compute).T
    return out


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def combine(
    y: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """sum over k of weights[r, k] * y[r, k], one after the other in k order, in `dtype`; pairs with id -1 are
    skipped."""
    out = torch.zeros(y.shape[0], y.shape[2], dtype=dtype, device=y.device)
    for k in range(y.shape[1]):
        term = out + weights[:, k, None].to(dtype) * y[:, k].to(dtype)
        out = torch.where(ids[:, k, None] >= 0, term, out)
    return out


def quantize_fp8(x: torch.Tensor, group: int = 128, nudge: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row and `group` columns: scale = peak / 448 (1 for a group of zeros), values x * (1 / scale) in
    e4m3. x [..., n]. `nudge`, of the scale, is added to every value before it is rounded."""
    grouped = x.float().unflatten(-1, (-1, group))
    peak = grouped.abs().amax(-1)
    scales = torch.where(peak == 0, torch.ones_like(peak), peak / torch.full_like(peak, E4M3_MAX))
    values = (grouped * (1.0 / scales)[..., None] + nudge).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values.flatten(-2), scales


def dequantize_fp8(
    values: torch.Tensor, scales: torch.Tensor, group: int = 128, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return (values.to(dtype).unflatten(-1, (-1, group)) * scales.to(dtype)[..., None]).flatten(-2)


def quantize_blocks(w: torch.Tensor, block: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [..., m, n] to e4m3 with one float32 scale per block x block, as the official fp8 checkpoints hold
    them."""
    blocks = w.float().unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
    peak = blocks.abs().amax((-1, -3))
    scales = torch.where(peak == 0, torch.ones_like(peak), peak / torch.full_like(peak, E4M3_MAX))
    values = (blocks / scales[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values.reshape(w.shape), scales


def dequantize_blocks(
    values: torch.Tensor, scales: torch.Tensor, block: int = 128, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    blocks = values.to(dtype).unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
    return (blocks * scales.to(dtype)[..., :, None, :, None]).reshape(values.shape)


def expert_rows_fp8(
    rows: torch.Tensor,
    ids: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scales: torch.Tensor,
    w2_scales: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    nudge: float = 0.0,
) -> torch.Tensor:
    """W8A8 as the kernel defines it: x quantised per 128 columns, the SwiGLU rows per 64 (one tile's outputs).
    `nudge`: see `quantize_fp8`, of the SwiGLU rows: two calls show which of them lie at an edge of two e4m3 numbers."""
    out = torch.zeros(*ids.shape, rows.shape[1], dtype=dtype, device=rows.device)
    x = dequantize_fp8(*quantize_fp8(rows), dtype=dtype)
    for expert in range(w13.shape[0]):
        row, k = (ids == expert).nonzero(as_tuple=True)
        if row.numel():
            gate_up = x[row] @ dequantize_blocks(w13[expert], w13_scales[expert], dtype=dtype).T
            h = dequantize_fp8(*quantize_fp8(swiglu(gate_up), 64, nudge), 64, dtype=dtype)
            out[row, k] = h @ dequantize_blocks(w2[expert], w2_scales[expert], dtype=dtype).T
    return out


def _round_up_8(n: int) -> int:
    return (n + 7) // 8 * 8
