"""Models to measure an engine with: their config.json alone, from which weights of noise are made
(`dummy_checkpoint.py`)."""

import json
from pathlib import Path
from typing import Any

from ..dummy_checkpoint import DummyCheckpoint
from ..errors import ConfigError
from ..make_checkpoint import complete_config

_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_INT4 = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "checkpoint_format": "gptq"}
_LARGE: dict[str, Any] = {"vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128}
_30B = _LARGE | {
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
}
_235B = _LARGE | {
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "intermediate_size": 12288,
}
_TINY = {
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "intermediate_size": 96,
}
CASES: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "30b": _30B,
    "30b-128k": _30B
    | {
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "30b-fp8": _30B | {"quantization_config": _FP8},
    "30b-int4": _30B | {"quantization_config": _INT4},
    "235b-fp8": _235B | {"quantization_config": _FP8},
    "235b-int4": _235B | {"quantization_config": _INT4},
    "32b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


def write_case(name: str, folder: Path, *, num_layers: int = 0) -> dict[str, Any]:
    """The case's config.json into `folder`; `num_layers` cuts a model that is too large for one GPU (0 = all of it)."""
    if name not in CASES:
        raise ConfigError("--case", name, f"one of {', '.join(CASES)}")
    raw = complete_config({"tie_word_embeddings": False} | CASES[name])
    if num_layers:
        raw["num_hidden_layers"] = num_layers
    (folder / "config.json").write_text(json.dumps(raw))
    return raw


def open_case(name: str, folder: Path, *, num_layers: int = 0) -> DummyCheckpoint:
    write_case(name, folder, num_layers=num_layers)
    return DummyCheckpoint(folder)
