"""Checkpoints as GPTQ, AWQ and fp8 publish them: read exactly, refused by name, and served like their dequantised
twin."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertmesh.checkpoint import Checkpoint
from expertmesh.cluster.attention.weights import load_attention_weights
from expertmesh.errors import CheckpointError, KernelError
from expertmesh.experts.device_experts import DeviceExperts
from expertmesh.experts.mlp import LocalExpertMLP
from expertmesh.experts.quantized_weights import are_quantized, load_quantized_layer
from expertmesh.kernels.expert_layer import ExpertLayer
from expertmesh.kernels.reference import quantize_blocks
from expertmesh.make_checkpoint import make_checkpoint
from expertmesh.quantized import AWQ_ORDER
from expertmesh.router.placement import uniform

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "num_experts": 3,
    "num_experts_per_tok": 2,
}
QUANTIZATION = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
PREFIX = "model.layers.0.mlp.experts."


def words(values):
    """[..., 8] integers 0..15 -> int32, the first in the lowest nibble."""
    word = sum(values[..., i].to(torch.int64) << (4 * i) for i in range(8))
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def quantise(kind, weight):
    """A linear layer's tensors as the publisher stores them, and the weights that they stand for."""
    outputs, inputs = weight.shape
    if kind == "fp8":
        values, scales = quantize_blocks(weight)
        scales = scales.bfloat16()
        exact = values.double() * scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        return {"weight": values, "weight_scale_inv": scales}, exact
    groups = weight.float().view(outputs, -1, 128)
    zeros = torch.full(groups.shape[:2], 8)
    if kind == "awq":
        zeros = torch.randint(5, 12, groups.shape[:2])
    scales = (groups.abs().amax(-1) / 4).half()
    q = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15).int()
    exact = ((q - zeros[..., None]).double() * scales.double()[..., None]).view(outputs, inputs)
    q, zeros, scales = q.view(outputs, inputs).T, zeros.T, scales.T.contiguous()
    if kind == "awq":
        order = list(AWQ_ORDER)
        packed = [words(t.reshape(t.shape[0], -1, 8)[..., order]) for t in (q, zeros)]
        return {"qweight": packed[0], "qzeros": packed[1], "scales": scales}, exact
    qweight = words(q.reshape(-1, 8, outputs).transpose(1, 2))
    qzeros = words((zeros - 1).reshape(zeros.shape[0], -1, 8))
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": torch.arange(inputs).int() // 128}, exact


@pytest.fixture(params=list(QUANTIZATION))
def twins(request, tmp_path):
    """Two folders: quantised projections, and the same as 32-bit numbers."""
    kind = request.param
    quantised, plain = tmp_path / kind, tmp_path / "plain"
    make_checkpoint(plain, CONFIG, dtype="float32")
    make_checkpoint(quantised, CONFIG, dtype="float32")
    tensors, exact = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        exact[name] = tensor.clone()
        if "_proj.weight" not in name:
            tensors[name] = tensor
            continue
        parts, weights = quantise(kind, tensor)
        exact[name] = weights.float()
        tensors |= {name.replace("weight", part): value.contiguous() for part, value in parts.items()}
    save_file(tensors, quantised / "model.safetensors")
    save_file(exact, plain / "model.safetensors")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION[kind]}))
    return quantised, plain


def experts_of(folder):
    experts = LocalExpertMLP(Checkpoint(folder))
    experts.set_placement(uniform(1, 3, 1), 0)
    return experts


def test_a_quantised_checkpoint_is_read_as_its_exact_weights(twins):
    quantised, plain = Checkpoint(twins[0]), Checkpoint(twins[1])
    for name in plain.names:
        shape = plain.shape(name)
        assert torch.equal(
            quantised.read(name, shape, dtype=torch.float32), plain.read(name, shape, dtype=torch.float32)
        ), name


def test_the_attention_tier_holds_the_exact_weights_of_a_quantised_checkpoint(twins):
    got, expected = (load_attention_weights(Checkpoint(folder), dtype=torch.float32).layers[0] for folder in twins)
    assert torch.equal(got.qkv, expected.qkv)
    assert torch.equal(got.o, expected.o)


def test_experts_of_a_quantised_checkpoint_give_the_rows_of_its_exact_twin(twins):
    rows, ids = torch.randn(6, 256), torch.tensor([[0, 2], [1, 0], [2, -1], [1, 2], [0, 1], [-1, -1]]).int()
    got, expected = (experts_of(folder).forward(0, rows, ids) for folder in twins)
    assert torch.equal(got, expected)


def test_the_kernels_forms_hold_the_same_weights_in_their_own_bits(twins):
    checkpoint, plain = Checkpoint(twins[0]), experts_of(twins[1])
    assert are_quantized(checkpoint, 0)
    assert not are_quantized(Checkpoint(twins[1]), 0)
    arguments = load_quantized_layer(checkpoint, 0, [2, 0, 1])
    layer = ExpertLayer(*arguments, kernels="torch", form="w8a16" if arguments[2] is not None else None)
    rows, ids = torch.randn(5, 256), torch.tensor([[1, 0], [2, 1], [0, 2], [1, 2], [0, 1]]).int()
    logical = torch.tensor([2, 0, 1], dtype=torch.int32)[ids.long()]
    got, expected = layer.rows(rows, ids).flatten(0, 1), plain.forward(0, rows, logical)
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_a_pool_of_places_takes_quantised_experts(twins):
    """As on a GPU, with the torch path in the kernels' place: fp8 then quantises activations too."""
    device = DeviceExperts(Checkpoint(twins[0]), dtype=torch.float32, device=torch.device("cpu"), kernels="torch")
    placed = device.place(0, (2, -1, 0, 1), [])
    device.use({0: placed})
    rows, ids = torch.randn(5, 256), torch.tensor([[2, 0], [0, 3], [3, 2], [2, 3], [0, 2]]).int()
    logical = torch.tensor([2, -1, 0, 1], dtype=torch.int32)[ids.long()]
    got = device.rows(0, rows, ids).flatten(0, 1)
    expected = experts_of(twins[1]).forward(0, rows, logical)
    fp8 = twins[0].name == "fp8"
    assert (got - expected).norm() < (6e-2 if fp8 else 1e-5) * expected.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq", "bits": 8}, "bits is 8, not 4"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "desc_act is True"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "checkpoint_format is 'gptq_v2'"),
        ({"quant_method": "awq", "group_size": 64}, "group_size is 64, not 128"),
        ({"quant_method": "awq", "version": "gemv"}, "version is 'gemv'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "not \\[128, 128\\]"),
        ({"quant_method": "bitsandbytes"}, "only gptq, awq and fp8"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(tmp_path, change, message):
    make_checkpoint(tmp_path, CONFIG, dtype="float32")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": change}))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("twins", ["gptq"], indirect=True)
def test_inputs_out_of_order_are_refused_where_they_are_met(twins):
    path = twins[0] / "model.safetensors"
    tensors = load_file(path)
    name = f"{PREFIX}1.up_proj.g_idx"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, path)
    with pytest.raises(KernelError, match="desc_act"):
        load_quantized_layer(Checkpoint(twins[0]), 0, [1])


@pytest.mark.parametrize("twins", ["fp8"], indirect=True)
def test_nan_among_fp8_weights_is_damage(twins):
    path = twins[0] / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{PREFIX}1.up_proj.weight"].view(torch.uint8)[3, 5] = 0x7F
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="NaN"):
        load_quantized_layer(Checkpoint(twins[0]), 0, [1])
