"""A checkpoint's config.json in every spelling, and what is refused by name."""

import json

import pytest

from expertmesh.errors import CheckpointError
from expertmesh.model_config import GenerationDefaults, ModelConfig

QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_released_config_is_read():
    config = ModelConfig.from_mapping(QWEN3_30B)
    assert (config.num_layers, config.num_experts, config.top_k, config.head_dim) == (48, 128, 8, 128)
    assert (config.q_size, config.kv_size) == (4096, 512)
    assert config.moe_layer_ids == tuple(range(48))
    assert config.rope.theta == 1e6
    assert config.rope.kind == "default"
    assert config.eos_token_ids == (151645,)
    assert config.kv_bytes_per_token(2) == 98_304
    assert 128 * 48 * config.expert_numel == 28_991_029_248


def test_new_spelling_gives_the_same_config():
    new = {k: v for k, v in QWEN3_30B.items() if k not in ("num_experts", "rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"num_local_experts": 128, "dtype": "bfloat16"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0}
    assert ModelConfig.from_mapping(new) == ModelConfig.from_mapping(QWEN3_30B)


@pytest.mark.parametrize("kind_key", ["type", "rope_type"])
def test_yarn_is_read_from_both_spellings(kind_key):
    yarn = {kind_key: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    old = ModelConfig.from_mapping(QWEN3_30B | {"rope_scaling": yarn})
    new = ModelConfig.from_mapping(
        {k: v for k, v in QWEN3_30B.items() if k not in ("rope_theta", "rope_scaling")}
        | {"rope_parameters": yarn | {"rope_theta": 1000000.0}}
    )
    assert old.rope == new.rope
    assert (old.rope.kind, old.rope.factor, old.rope.original_max_position_embeddings) == ("yarn", 4.0, 32768)


def test_sparse_step_and_mlp_only_layers_decide_which_layers_have_experts():
    config = ModelConfig.from_mapping(
        QWEN3_30B | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    )
    assert config.moe_layer_ids == (1, 5)


def test_dense_model_has_no_experts():
    dense = {k: v for k, v in QWEN3_30B.items() if "expert" not in k}
    dense |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    config = ModelConfig.from_mapping(dense)
    assert config.moe_layer_ids == ()
    assert config.num_experts == 0


def test_head_dim_defaults_to_hidden_over_heads():
    config = ModelConfig.from_mapping({k: v for k, v in QWEN3_30B.items() if k != "head_dim"})
    assert config.head_dim == 64


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "llama"),
        ({"architectures": ["Qwen3MoeForSequenceClassification"]}, "Qwen3MoeForSequenceClassification"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized (fp8)"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused_by_name(change, names):
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        ModelConfig.from_mapping(QWEN3_30B | change)
    assert names in str(caught.value)


def test_unreadable_config_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_generation_defaults_come_from_the_file_and_fall_back_to_the_config(tmp_path):
    config = ModelConfig.from_mapping(QWEN3_30B)
    absent = GenerationDefaults.from_folder(tmp_path, config)
    assert absent.eos_token_ids == (151645,)
    assert not absent.do_sample
    (tmp_path / "generation_config.json").write_text(
        json.dumps(
            {"eos_token_id": [151645, 151643], "temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}
        )
    )
    read = GenerationDefaults.from_folder(tmp_path, config)
    assert read.eos_token_ids == (151645, 151643)
    assert (read.temperature, read.top_p, read.top_k, read.min_p, read.do_sample) == (0.6, 0.95, 20, 0.0, True)
