"""Qwen3-MoE for training: the exact model, arranged for speed at this size.

Every expert is computed for every token as two large products, and the experts a token did not choose get weight zero:
the same function and the same gradients as the sparse model. Why: with 32 experts 64 wide, moving rows about costs more
than four times the arithmetic; two GEMMs a layer keep the GPU busy, have fixed shapes and never drop a token.
Documents lie end to end in one flat run `[num_tokens]`; attention sees `cu_seqlens`, so they never mix.
`hf_state_dict` writes the weights under the names of the released checkpoints, one tensor an expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    vocab_size: int = 2112  # 2,048 tokens and 64 rows of padding, which must never be sampled
    pad_token_id: int = 2022
    eos_token_id: int = 2024
    hidden_size: int = 128
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64  # not hidden_size / num_heads
    num_experts: int = 32
    top_k: int = 8
    moe_intermediate_size: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096

    def hf_config(self) -> dict[str, object]:
        """config.json, in the form of the released Qwen3 checkpoints."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": self.pad_token_id,
            "decoder_sparse_step": 1,
            "eos_token_id": self.eos_token_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.top_k * self.moe_intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "max_window_layers": self.num_layers,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": self.moe_intermediate_size,
            "norm_topk_prob": True,
            "num_attention_heads": self.num_heads,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "output_router_logits": False,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": self.rope_theta,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.head_dim
        self.q_size, self.kv_size = config.num_heads * width, config.num_kv_heads * width
        self.input_norm = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Parameter(torch.empty(self.q_size + 2 * self.kv_size, hidden))
        self.q_norm = nn.Parameter(torch.ones(width))
        self.k_norm = nn.Parameter(torch.ones(width))
        self.o = nn.Parameter(torch.empty(hidden, self.q_size))
        self.post_norm = nn.Parameter(torch.ones(hidden))
        self.gate = nn.Parameter(torch.empty(config.num_experts, hidden))
        rows = config.num_experts * config.moe_intermediate_size
        self.w1 = nn.Parameter(torch.empty(rows, hidden))  # gate_proj of all experts, expert-major
        self.w3 = nn.Parameter(torch.empty(rows, hidden))  # up_proj
        self.w2 = nn.Parameter(torch.empty(hidden, rows))  # down_proj, columns expert-major


def attention_inputs(
    x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, config: ModelConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each [num_tokens, num_heads, head_dim]; KV heads repeated for their group."""
    num_tokens, width, eps = x.shape[0], config.head_dim, config.rms_norm_eps
    sizes = (config.num_heads * width, config.num_kv_heads * width, config.num_kv_heads * width)
    q, k, v = F.linear(rms_norm(x, norm, eps), qkv).split(sizes, dim=-1)
    q = rotate(rms_norm(q.view(num_tokens, -1, width), q_norm, eps), cos, sin)
    k = rotate(rms_norm(k.view(num_tokens, -1, width), k_norm, eps), cos, sin)
    group = config.num_heads // config.num_kv_heads
    return q, k.repeat_interleave(group, dim=1), v.view(num_tokens, -1, width).repeat_interleave(group, dim=1)


def rest_of_layer(
    x: Tensor, attended: Tensor, valid: Tensor, o: Tensor, norm: Tensor, gate: Tensor, w1: Tensor, w3: Tensor,
    w2: Tensor,
    config: ModelConfig,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The layer's output; per expert the number of valid tokens and the sum of their router probabilities."""
    num_tokens = x.shape[0]
    x = x + F.linear(attended.reshape(num_tokens, -1), o)
    normed = rms_norm(x, norm, config.rms_norm_eps)
    with torch.autocast(x.device.type, enabled=False):
        probs = F.linear(normed.float(), gate).softmax(-1)  # [num_tokens, num_experts]
        top_probs, top_ids = probs.topk(config.top_k, dim=-1)
        chosen = torch.zeros_like(probs).scatter(1, top_ids, 1.0)
        weights = probs * chosen / top_probs.sum(-1, keepdim=True)
    hidden = F.silu(F.linear(normed, w1)) * F.linear(normed, w3)
    hidden = hidden.view(num_tokens, config.num_experts, -1) * weights.unsqueeze(-1).to(hidden.dtype)
    x = x + F.linear(hidden.view(num_tokens, -1), w2)
    return x, (chosen * valid).sum(0), (probs * valid).sum(0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int) -> Tensor:
    """Causal attention inside each document: flash attention on CUDA, a block mask elsewhere."""
    if q.is_cuda:
        return torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, 0.0, True, False
        )[0]
    index = torch.arange(q.shape[0], device=q.device)
    document = torch.searchsorted(cu_seqlens[1:].long(), index, right=True)
    mask = (document[:, None] == document[None]) & (index[:, None] >= index[None])
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


class TrainingModel(nn.Module):
    def __init__(self, config: ModelConfig, *, compiled: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        angles = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None] * (
            config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
        )
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos().float(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin().float(), persistent=False)
        wrap = torch.compile if compiled else (lambda function: function)
        self._inputs, self._rest, self._loss = wrap(attention_inputs), wrap(rest_of_layer), wrap(token_losses)
        self._init()

    @property
    def blocks(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    @torch.no_grad()
    def _init(self) -> None:
        config = self.config
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                continue
            fan_in = config.moe_intermediate_size if name.endswith("w2") else parameter.shape[1]
            std = 0.02 if name.endswith(("embed", "gate")) else fan_in**-0.5
            std *= (2 * config.num_layers) ** -0.5 if name.endswith(("w2", ".o")) else 1.0
            parameter.normal_(0.0, std)

    def forward(
        self, tokens: Tensor, targets: Tensor, positions: Tensor, cu_seqlens: Tensor, max_len: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per-token losses and hits [num_tokens], expert shares [layers, experts] and the load-balancing loss.

        The balance loss is taken over the whole global batch, not per document, so that experts may specialise.
        Idea: "Demons in the Detail" (Qwen team, 2025)."""
        x = F.embedding(tokens, self.embed)
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        valid = (tokens != self.config.pad_token_id).unsqueeze(-1).float()
        shares, means = [], []
        config = self.config
        for layer in self.blocks:
            q, k, v = self._inputs(x, cos, sin, layer.input_norm, layer.qkv, layer.q_norm, layer.k_norm, config)
            attended = varlen_attention(q, k, v, cu_seqlens, max_len)
            weights = (layer.o, layer.post_norm, layer.gate, layer.w1, layer.w3, layer.w2)
            x, counts, probs = self._rest(x, attended, valid, *weights, config)
            shares.append(counts)
            means.append(probs)
        total = valid.sum()
        share = torch.stack(shares) / total  # [layers, experts], sums to top_k in each layer
        balance = (share.detach() * torch.stack(means) / total).sum(-1).mean() * config.num_experts / config.top_k
        losses, hits = self._loss(x, self.norm, self.embed, targets, config.rms_norm_eps)
        return losses, hits, share, balance

    def hf_state_dict(self) -> dict[str, Tensor]:
        """bf16 weights under Hugging Face names; tied, so without lm_head."""
        config, size = self.config, self.config.moe_intermediate_size
        state: dict[str, Tensor] = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        for index, layer in enumerate(self.blocks):
            prefix = f"model.layers.{index}."
            q, k, v = layer.qkv.split((layer.q_size, layer.kv_size, layer.kv_size))
            state |= {f"{prefix}self_attn.{n}_proj.weight": t for n, t in zip("qkvo", (q, k, v, layer.o))}
            state |= {f"{prefix}self_attn.{n}_norm.weight": t for n, t in zip("qk", (layer.q_norm, layer.k_norm))}
            state |= {f"{prefix}input_layernorm.weight": layer.input_norm}
            state |= {
                f"{prefix}post_attention_layernorm.weight": layer.post_norm,
                f"{prefix}mlp.gate.weight": layer.gate,
            }
            for expert in range(config.num_experts):
                rows = slice(expert * size, (expert + 1) * size)
                names = f"{prefix}mlp.experts.{expert}."
                state |= {
                    f"{names}gate_proj.weight": layer.w1[rows],
                    f"{names}up_proj.weight": layer.w3[rows],
                    f"{names}down_proj.weight": layer.w2[:, rows],
                }
        return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}


def load_hf_state_dict(model: TrainingModel, state: dict[str, Tensor]) -> None:
    """The inverse of `hf_state_dict`: go on from a saved checkpoint, with a fresh optimiser."""
    with torch.no_grad():
        model.embed.copy_(state["model.embed_tokens.weight"])
        model.norm.copy_(state["model.norm.weight"])
        for index, layer in enumerate(model.blocks):
            prefix = f"model.layers.{index}."
            layer.qkv.copy_(torch.cat([state[f"{prefix}self_attn.{n}_proj.weight"] for n in "qkv"]))
            layer.o.copy_(state[f"{prefix}self_attn.o_proj.weight"])
            layer.q_norm.copy_(state[f"{prefix}self_attn.q_norm.weight"])
            layer.k_norm.copy_(state[f"{prefix}self_attn.k_norm.weight"])
            layer.input_norm.copy_(state[f"{prefix}input_layernorm.weight"])
            layer.post_norm.copy_(state[f"{prefix}post_attention_layernorm.weight"])
            layer.gate.copy_(state[f"{prefix}mlp.gate.weight"])
            experts = [f"{prefix}mlp.experts.{expert}." for expert in range(model.config.num_experts)]
            layer.w1.copy_(torch.cat([state[f"{name}gate_proj.weight"] for name in experts]))
            layer.w3.copy_(torch.cat([state[f"{name}up_proj.weight"] for name in experts]))
            layer.w2.copy_(torch.cat([state[f"{name}down_proj.weight"] for name in experts], dim=1))


def token_losses(x: Tensor, norm: Tensor, embed: Tensor, targets: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Cross entropy and argmax hits; 0 and True where the target is IGNORE (< 0)."""
    logits = F.linear(rms_norm(x, norm, eps), embed).float()
    losses = F.cross_entropy(logits, targets.clamp(min=0), reduction="none")
    counts = targets >= 0
    return losses * counts, (logits.argmax(-1) == targets) | ~counts
