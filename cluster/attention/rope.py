"""Rotary position embedding: inverse frequencies (plain and YaRN) and a table of cos and sin by position.

The table grows by powers of two as positions are met, so a model with a context of 262,144 pays for what is used,
and a position's row never changes. `sin` has its first half negated: rotate-half is then a roll of the vector.
Reference: transformers' `_compute_yarn_parameters` and Qwen3MoeRotaryEmbedding; YaRN is arXiv 2309.00071."""

import math

import torch

from ...model_config import RopeConfig


class RotaryTable:
    """cos and sin of every position met so far, [num_positions, head_dim] float32."""

    def __init__(self, rope: RopeConfig, head_dim: int, *, device: torch.device | str = "cpu") -> None:
        self.inv_freq, self.attention_factor = inverse_frequencies(rope, head_dim)  # [head_dim / 2] float32
        self.device = device
        self._cos = self._sin = torch.empty(0, head_dim, device=device)

    def rows(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] int64 -> cos, sin [T, 1, head_dim]."""
        needed = int(positions.max()) + 1 if positions.numel() else 0
        if needed > self._cos.shape[0]:
            self._grow(1 << max(needed - 1, 1023).bit_length())
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def _grow(self, num_positions: int) -> None:
        start = self._cos.shape[0]
        angles = torch.arange(start, num_positions, dtype=torch.float32)[:, None] * self.inv_freq  # [new, head_dim / 2]
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        self._cos = torch.cat([self._cos, torch.cat([cos, cos], dim=-1).to(self.device)])
        self._sin = torch.cat([self._sin, torch.cat([-sin, sin], dim=-1).to(self.device)])


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, head_dim]; cos, sin [T, 1, head_dim] from RotaryTable (sin signed)."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """[head_dim / 2] float32, and the factor on cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return plain, 1.0
    low, high = _correction_range(rope, head_dim)
    stretched = 1.0 / (rope.factor * rope.theta**exponents)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp  # 1 = extrapolate (fast dimensions stay), 0 = interpolate
    return stretched * (1 - keep) + plain * keep, _attention_factor(rope)


def _correction_range(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """Dimensions that turn `beta_fast` and `beta_slow` times over the original context."""

    def dimension(rotations: float) -> float:
        length = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return (low, high + 0.001) if low == high else (low, high)


def _attention_factor(rope: RopeConfig) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
