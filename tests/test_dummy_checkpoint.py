"""Weights that no file holds: of every form, the same for everybody, finite at any depth, and routed evenly."""

import json

import pytest
import torch

from expertmesh import cli
from expertmesh.checkpoint import DTYPES
from expertmesh.cluster.attention.weights import load_attention_weights
from expertmesh.cluster.commands.serve import serve_config
from expertmesh.config import WeightsConfig
from expertmesh.dummy_checkpoint import DummyCheckpoint, stored_tensors
from expertmesh.errors import CheckpointError
from expertmesh.experts.mlp import LocalExpertMLP
from expertmesh.make_checkpoint import complete_config
from expertmesh.model_config import ModelConfig
from expertmesh.model_source import open_model
from expertmesh.numerics import Numerics, rms_norm, silu_mul
from expertmesh.router.gate import top_k
from expertmesh.router.placement import uniform

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
QUANTIZATION = {
    "bf16": None,
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
}
EXPERT = "model.layers.1.mlp.experts.5."


def folder_of(tmp_path, form="bf16", **changes):
    raw = complete_config(CONFIG | changes)
    if QUANTIZATION[form]:
        raw["quantization_config"] = QUANTIZATION[form]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path


@pytest.fixture(params=list(QUANTIZATION))
def checkpoint(request, tmp_path):
    return DummyCheckpoint(folder_of(tmp_path, request.param, num_experts=16))


def test_the_configuration_names_it_and_no_file_but_config_json_is_needed(tmp_path):
    made = open_model(str(folder_of(tmp_path)), WeightsConfig(load_format="dummy"))
    assert isinstance(made, DummyCheckpoint)
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        open_model(str(tmp_path), WeightsConfig())


def test_serve_takes_it_as_a_flag():
    arguments = cli.make_parser().parse_args(["serve", "--model", "m", "--load-format", "dummy"])
    assert serve_config(arguments, {}).weights.load_format == "dummy"


def test_a_tensor_is_the_same_for_every_reader_and_its_own_for_every_name(checkpoint):
    again = DummyCheckpoint(checkpoint.folder)
    names = [name for name in checkpoint.names if EXPERT in name or "layers.0.self_attn.q_proj" in name]
    seen = {}
    for name in names:
        entry = checkpoint.entry(name)
        seen[name] = checkpoint.as_stored(name, entry.shape)
        assert torch.equal(again.as_stored(name, entry.shape).view(torch.uint8), seen[name].view(torch.uint8))
        assert seen[name].dtype == DTYPES[entry.dtype]
        assert entry.num_bytes == seen[name].nbytes
    noise = {name: t.view(torch.uint8).flatten() for name, t in seen.items() if name.endswith("weight")}
    noise |= {name: t.view(torch.uint8).flatten() for name, t in seen.items() if name.endswith("qweight")}
    different = {bytes(t[:64].numpy()) for t in noise.values()}
    assert len(different) == len(noise) == 4


def test_a_slice_and_a_converted_copy_hold_the_values_of_the_whole(tmp_path):
    checkpoint = DummyCheckpoint(folder_of(tmp_path))
    name, shape = EXPERT + "gate_proj.weight", (128, 256)
    whole = checkpoint.read(name, shape, dtype=torch.bfloat16)
    assert torch.equal(checkpoint.read(name, shape, dtype=torch.float32), whole.float())
    row = torch.empty(256, dtype=torch.bfloat16)
    checkpoint.read_into(name, row, index=7)
    assert torch.equal(row, whole[7])


def test_sizes_are_those_of_the_released_forms(tmp_path):
    sizes = {"bf16": 37_748_736, "fp8": 18_876_672, "gptq": 9_844_736, "awq": 9_805_824}  # one expert of 235B
    for form, expected in sizes.items():
        config = ModelConfig.from_mapping(
            complete_config(CONFIG | {"hidden_size": 4096, "moe_intermediate_size": 1536})
        )
        tensors = stored_tensors(config, "" if form == "bf16" else form)
        sizes = [torch.Size(s).numel() * DTYPES[d].itemsize for n, (d, s) in tensors.items() if EXPERT in n]
        assert sum(sizes) == expected


def test_a_shape_without_groups_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="gptq form with groups of 128") as caught:
        DummyCheckpoint(folder_of(tmp_path, "gptq", moe_intermediate_size=96))
    assert caught.value.tensor.endswith("proj.weight")


def test_what_a_layer_adds_is_finite_and_of_order_one(checkpoint):
    config, dtype = checkpoint.config, torch.float32
    weights = load_attention_weights(checkpoint, dtype=dtype)
    for name in ("input_norm", "post_norm", "qk_norm"):
        assert (getattr(weights.layers[0], name) == 1).all()
    x = weights.embed[torch.arange(64)]
    assert 0.9 < x.std() < 1.1
    layer = weights.layers[1]
    q = torch.nn.functional.linear(rms_norm(x, layer.input_norm, 1e-6), layer.qkv)
    assert 0.8 < q.std() < 1.25
    experts = LocalExpertMLP(checkpoint, Numerics(), dtype=dtype)
    experts.set_placement(uniform(config.num_layers, config.num_experts, 1), 0)
    ids = (torch.arange(64 * 8, dtype=torch.int32) % config.num_experts).view(64, 8)
    rows = experts.forward(1, rms_norm(x, layer.post_norm, 1e-6), ids)
    assert rows.isfinite().all()
    assert 0.1 < rows.std() * (2 * config.num_layers) ** 0.5 < 3


def test_noise_has_no_mean_that_layers_could_pile_up(checkpoint):
    weights = load_attention_weights(checkpoint, dtype=torch.float32)
    for matrix in (weights.layers[0].qkv, weights.layers[1].o):
        assert abs(matrix.mean()) < 4 * matrix.std() / matrix.numel() ** 0.5


@pytest.mark.parametrize("form", list(QUANTIZATION))
def test_routers_spread_a_batch_as_even_routing_does(tmp_path, form):
    """8, 51.6, 111.8 and 128 distinct experts of 128 for 1, 8, 32 and 128 tokens are what even routing gives."""
    checkpoint = DummyCheckpoint(folder_of(tmp_path, form, num_hidden_layers=2))
    config = checkpoint.config
    weights = load_attention_weights(checkpoint, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for batch, least, most in ((1, 8, 8), (8, 44, 58), (32, 102, 120), (128, 125, 128)):
        x = weights.embed[torch.randint(0, config.vocab_size, (batch,), generator=generator)]
        for _ in range(4):  # the model's layers again and again: a deeper one
            for layer in weights.layers:
                value = torch.nn.functional.linear(rms_norm(x, layer.input_norm, 1e-6), layer.qkv)[:, -config.kv_size :]
                x = x + torch.nn.functional.linear(value.repeat(1, config.num_heads // config.num_kv_heads), layer.o)
                assert layer.gate is not None
                logits = torch.nn.functional.linear(rms_norm(x, layer.post_norm, 1e-6), layer.gate)
                ids, _ = top_k(logits, 8, renormalize=True)
                assert least <= ids.unique().numel() <= most


def test_a_dense_model_has_its_weights_too(tmp_path):
    raw = complete_config("tiny-dense") | {"vocab_size": 512, "bos_token_id": None, "eos_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    checkpoint = DummyCheckpoint(tmp_path)
    weights = load_attention_weights(checkpoint, dtype=torch.float32)
    assert weights.lm_head is weights.embed
    out = torch.nn.functional.linear(
        silu_mul(torch.nn.functional.linear(weights.embed, weights.layers[0].w13)), weights.layers[0].w2
    )
    assert out.isfinite().all()
