"""What the bench runs on: the shapes of Qwen3's MoE layers, random weights in each form, routings, and the floor.

Floor = max(bytes of the touched weights and of the rows in and out / read rate, flops / matrix rate): what no
kernel can beat on the machine whose ceilings were measured in the same run."""

from dataclasses import dataclass

import torch

from . import reference
from .bench_clock import DEVICE, FP8, Ceilings
from .expert_layer import ExpertLayer, LayerForm
from .pack_int4 import Int4Matrix, dequantize_int4, random_int4

MODELS = {
    "30b": (2048, 768, 128),
    "235b": (4096, 1536, 128),
    "480b": (6144, 2560, 160),
}  # hidden, intermediate, experts
TOP_K = 8
FORMS: tuple[LayerForm, ...] = ("bf16", "fp8", "w8a16", "int4")
BYTES_PER_WEIGHT = {"bf16": 2.0, "fp8": 1.0, "w8a16": 1.0, "int4": 0.5 + 2 / 128}  # int4 with its groups' scales


@dataclass(frozen=True, slots=True)
class Shape:
    """One shard's part of one layer."""

    model: str
    num_local: int
    form: LayerForm

    @property
    def hidden(self) -> int:
        return MODELS[self.model][0]

    @property
    def intermediate(self) -> int:
        return MODELS[self.model][1]

    @property
    def num_experts(self) -> int:
        return MODELS[self.model][2]

    @property
    def expert_bytes(self) -> float:
        return 3 * self.hidden * self.intermediate * BYTES_PER_WEIGHT[self.form]

    @property
    def pair_flops(self) -> int:
        return 6 * self.hidden * self.intermediate


@dataclass(frozen=True, slots=True)
class Draw:
    """One routing of num_tokens tokens."""

    x: torch.Tensor  # [num_tokens, hidden] bf16
    all_ids: torch.Tensor  # [num_tokens, top_k] int32 among all experts
    ids: torch.Tensor  # the same, -1 where the expert is not local
    weights: torch.Tensor  # [num_tokens, top_k] float32
    num_pairs: int  # local ones
    num_distinct: int  # local experts with rows


@dataclass(frozen=True, slots=True)
class Weights:
    """Local experts in the checkpoint's layout; e4m3 has scales of 128x128 blocks."""

    w13: torch.Tensor | Int4Matrix
    w2: torch.Tensor | Int4Matrix
    scales: tuple[torch.Tensor, ...] = ()

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers that they stand for."""
        if isinstance(self.w13, Int4Matrix) or isinstance(self.w2, Int4Matrix):
            assert isinstance(self.w13, Int4Matrix)
            assert isinstance(self.w2, Int4Matrix)
            return dequantize_int4(self.w13), dequantize_int4(self.w2)
        if self.scales:
            return reference.dequantize_blocks(self.w13, self.scales[0]), reference.dequantize_blocks(
                self.w2, self.scales[1]
            )
        return self.w13, self.w2


def make_weights(shape: Shape) -> Weights:
    if shape.form == "int4":
        return Weights(*random_int4(shape.num_local, shape.hidden, shape.intermediate, device=DEVICE))
    torch.manual_seed(3)
    is_fp8 = shape.form != "bf16"
    sizes = ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate))
    dtype = FP8 if is_fp8 else torch.bfloat16
    out = [torch.empty(shape.num_local, *size, dtype=dtype, device=DEVICE) for size in sizes]
    scales = [torch.empty(shape.num_local, r // 128, c // 128, device=DEVICE) for r, c in sizes]
    for w, s in zip(out, scales):
        for e in range(shape.num_local):
            sample = torch.randn(w.shape[1:], device=DEVICE) * 0.02
            if is_fp8:
                w[e], s[e] = reference.quantize_blocks(sample)
            else:
                w[e] = sample.to(dtype)
    return Weights(out[0], out[1], tuple(scales) if is_fp8 else ())


def make_layer(shape: Shape, weights: Weights) -> ExpertLayer:
    return ExpertLayer(weights.w13, weights.w2, *weights.scales, kernels="cuda", form=shape.form)


def make_draws(shape: Shape, num_tokens: int, routing: str) -> list[Draw]:
    """So many that a call's weights have left the L2 when the graph comes back to them."""
    count = 16 if num_tokens == 1 else 8 if num_tokens <= 128 else 3 if num_tokens <= 2048 else 2
    return [draw(shape, num_tokens, routing, 100 * num_tokens + s) for s in range(count)]


def draw(shape: Shape, num_tokens: int, routing: str, seed: int) -> Draw:
    """At least one pair is local, as for a shard that was sent rows at all. zipf: popularity ~ rank ** -1.2."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    popularity = torch.zeros(shape.num_experts, device=DEVICE)
    if routing == "zipf":
        ranks = torch.randperm(shape.num_experts, device=DEVICE, generator=generator) + 1
        popularity = -1.2 * ranks.float().log()
    while True:
        uniform = torch.rand(num_tokens, shape.num_experts, device=DEVICE, generator=generator)
        ids = (popularity - (-uniform.clamp_min(1e-20).log()).log()).topk(TOP_K).indices.to(torch.int32)
        if bool((ids < shape.num_local).any()):
            break
    weights = torch.rand(num_tokens, TOP_K, device=DEVICE, generator=generator)
    weights /= weights.sum(-1, keepdim=True)
    x = torch.randn(num_tokens, shape.hidden, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    local = torch.where(ids < shape.num_local, ids, -1)
    return Draw(x, ids, local, weights, int((local >= 0).sum()), int(local[local >= 0].unique().numel()))


def touched_bytes(draws: list[Draw], shape: Shape) -> float:
    return sum(d.num_distinct for d in draws) / len(draws) * shape.expert_bytes


def flops(draws: list[Draw], shape: Shape) -> float:
    return sum(d.num_pairs for d in draws) / len(draws) * shape.pair_flops


def floor_us(draws: list[Draw], shape: Shape, ceilings: Ceilings) -> float:
    row_bytes = 2 * draws[0].x.shape[0] * shape.hidden * 2
    rate = ceilings.fp8_tflops if shape.form == "fp8" else ceilings.bf16_tflops
    return max((touched_bytes(draws, shape) + row_bytes) / ceilings.read_gbps / 1e3, flops(draws, shape) / rate / 1e6)
