"""Small configurations that together cover what a Qwen3 checkpoint may say; parity runs go through all of them."""

from dataclasses import dataclass, field
from typing import Any

MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 32,
    "num_experts_per_tok": 8,
}
DENSE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    name: str
    config: dict[str, Any]
    checkpoint: dict[str, Any] = field(default_factory=dict)  # arguments of make_checkpoint


def _moe(name: str, checkpoint: dict[str, Any] | None = None, **fields: Any) -> Configuration:
    config = {key: value for key, value in (MOE | fields).items() if value is not None}
    return Configuration(name=name, config=config, checkpoint=checkpoint or {})


def _dense(name: str, **fields: Any) -> Configuration:
    return Configuration(name=name, config=DENSE | fields)


CONFIGURATIONS = (
    _moe(
        "128 experts top-8, untied, 8:1 query groups, heads wider than hidden",
        num_experts=128,
        num_attention_heads=8,
        num_key_value_heads=1,
    ),
    _moe("tied, weights not renormalised, new spelling", norm_topk_prob=False, tie_word_embeddings=True,
         num_experts=None, num_local_experts=32, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    _moe("mlp_only_layers, as many kv heads as heads", mlp_only_layers=[1], num_key_value_heads=4, head_dim=16),
    _moe("decoder_sparse_step 2, top-2 of 6, odd widths", num_hidden_layers=4, decoder_sparse_step=2, num_experts=6,
         num_experts_per_tok=2, moe_intermediate_size=40, hidden_size=72, intermediate_size=100, head_dim=24),
    _moe("YaRN, old spelling", rope_theta=5000.0, max_position_embeddings=256, rope_scaling=_YARN | {"type": "yarn"}),
    _moe("YaRN, new spelling, own attention factor and betas", max_position_embeddings=256,
         rope_parameters=_YARN | {"rope_type": "yarn", "rope_theta": 10000.0, "attention_factor": 1.3,
                                  "beta_fast": 16.0, "beta_slow": 2.0}),
    _moe("fused experts in several files", {"fused_experts": True, "max_shard_bytes": 300_000}),
    _moe("bfloat16 on disk, several files, per-expert", {"dtype": "bfloat16", "max_shard_bytes": 200_000},
         tie_word_embeddings=True, num_experts=64),
    _dense("dense, tied", tie_word_embeddings=True),
    _dense("dense, YaRN, one kv head, untied", num_key_value_heads=1, max_position_embeddings=256,
           rope_scaling=_YARN | {"rope_type": "yarn"}),
)  # fmt: skip
