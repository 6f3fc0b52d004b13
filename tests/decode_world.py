"""Steps of decodes as `decode_attention` takes them, and what must come of one: heads in float64, the cache."""

from dataclasses import dataclass

import torch

from expertmesh.kernels import attention_reference
from expertmesh.kernels.kv_numbers import as_moved, from_kv, to_kv

EPS = 1e-6
BF16 = torch.bfloat16


@dataclass
class DecodeStep:
    """One new token for each row; rows of length 0 are padding."""

    lengths: list[int]  # with the new token
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    qkv: torch.Tensor  # [T, (num_heads + 2 * num_kv_heads) * head_dim]
    qk_norm: torch.Tensor
    cos_sin: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    k: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim] bf16 or e4m3; NaN where nothing was written
    v: torch.Tensor
    kv_lens: torch.Tensor
    page_starts: torch.Tensor
    pages: torch.Tensor
    out: torch.Tensor
    expected_k: torch.Tensor
    expected_v: torch.Tensor

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    def arguments(self) -> list:
        """In the kernel's order."""
        caches = [self.k, self.v, self.kv_lens, self.page_starts, self.pages]
        first = [self.qkv, self.qk_norm, EPS, self.cos_sin, self.positions, self.slots]
        return [*first, *caches, self.head_dim**-0.5, self.out]

    def pages_of(self, row: int) -> torch.Tensor:
        start = int(self.page_starts[row])
        return self.pages[start : start + -(-self.lengths[row] // self.block_size)].long()

    def queries(self, function=attention_reference.qk_norm_rope) -> torch.Tensor:
        """[T, num_heads, head_dim]; the new k and v go to the expected caches."""
        sizes = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}
        given = (self.qkv, self.qk_norm, EPS, self.cos_sin, self.positions, self.slots)
        return function(*given, self.expected_k, self.expected_v, **sizes)

    def heads(self, q: torch.Tensor) -> torch.Tensor:
        """[T, num_heads, head_dim] float64 over the expected caches."""
        out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
        group = self.num_heads // self.num_kv_heads
        for row, length in enumerate(self.lengths):
            if length:
                caches = (self.expected_k, self.expected_v)
                mine = (from_kv(as_moved(cache)[self.pages_of(row)], torch.float64) for cache in caches)
                k, v = (x.flatten(0, 1)[:length] for x in mine)
                k, v = (x.repeat_interleave(group, 1) for x in (k, v))  # [L, heads, D]
                scores = torch.einsum("hd,lhd->hl", q[row].double(), k) * self.head_dim**-0.5
                out[row] = torch.einsum("hl,lhd->hd", scores.softmax(-1), v)
        return out


def decode_step(
    lengths: list[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    block_size: int = 16,
    seed: int = 0,
    device: str = "cpu",
    width: int = 0,  # of a row of the block table, at least
    kv_dtype: torch.dtype = BF16,
) -> DecodeStep:
    """Pages of all requests are mixed; what no earlier step has written is NaN, the new token's place too."""
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator).to(BF16)

    width = max([width, *(-(-n // block_size) for n in lengths)])
    num_blocks = sum(-(-n // block_size) for n in lengths) + 3
    order = torch.randperm(num_blocks, generator=generator, device=device).tolist()
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    k, v = (torch.full(shape, torch.nan, dtype=BF16, device=device) for _ in range(2))
    pages, slots = [], []
    for length in lengths:
        count = -(-length // block_size)
        mine, order = order[:count], order[count:]
        pages += mine + [num_blocks + 1000] * (width - count)
        slots.append(mine[-1] * block_size + (length - 1) % block_size if length else -1)
        if length > 1:
            at = (
                (torch.tensor(mine)[:, None] * block_size + torch.arange(block_size)).flatten()[: length - 1].to(device)
            )
            for cache in (k, v):
                cache.view(-1, num_kv_heads, head_dim)[at] = noise(length - 1, num_kv_heads, head_dim)
    k, v = to_kv(k, kv_dtype), to_kv(v, kv_dtype)
    most = max(*lengths, 2)
    angles = torch.arange(most)[:, None] * 10000.0 ** -(torch.arange(head_dim // 2) / (head_dim // 2))
    rows = len(lengths)
    return DecodeStep(
        lengths,
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        qkv=noise(rows, (num_heads + 2 * num_kv_heads) * head_dim),
        qk_norm=noise(num_heads + num_kv_heads, head_dim),
        cos_sin=torch.cat([angles.cos(), angles.sin()], 1).to(device),
        positions=torch.tensor([max(n - 1, 0) for n in lengths], device=device),
        slots=torch.tensor(slots, device=device),
        k=k,
        v=v,
        kv_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        page_starts=torch.arange(rows, dtype=torch.int32, device=device) * width,
        pages=torch.tensor(pages, dtype=torch.int32, device=device),
        out=torch.full((rows, num_heads, head_dim), torch.nan, dtype=BF16, device=device),
        expected_k=k.clone(),
        expected_v=v.clone(),
    )


def assert_right(step: DecodeStep) -> None:
    """Of a step that has run, on a CPU with the reference's own roundings."""
    assert_heads(step, step.heads(step.queries()))
    for cache, expected in ((step.k, step.expected_k), (step.v, step.expected_v)):
        ulp = 2**-6 if cache.dtype == BF16 else 2**-2
        got, right = from_kv(cache, torch.float32), from_kv(expected, torch.float32)
        assert torch.equal(got.isnan(), right.isnan()), "a place that nobody asked for"
        got, right = got.nan_to_num(0.0), right.nan_to_num(0.0)
        assert int((got != right).sum()) <= 4 + got.numel() // 1000
        assert bool(((got - right).abs() <= ulp * right.abs() + 1e-6).all())


def assert_heads(step: DecodeStep, expected: torch.Tensor) -> None:
    """Within a few roundings of bf16; zeros for padding."""
    assert not step.out.isnan().any()
    padding = [row for row, length in enumerate(step.lengths) if not length]
    assert not step.out[padding].any()
    assert float((step.out.double() - expected).norm() / expected.norm()) < 5e-3
    torch.testing.assert_close(step.out.double(), expected, atol=2e-2, rtol=2e-2)
