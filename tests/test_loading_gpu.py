"""Loading onto a GPU: many threads give what one gives, in the memory that was promised; noise is the same for all."""

import json

import pytest
import torch

from expertmesh import parallel_reads
from expertmesh.bench.loading import same, write_files
from expertmesh.checkpoint import Checkpoint
from expertmesh.cluster.attention.weights import load_attention_weights
from expertmesh.dummy_checkpoint import DummyCheckpoint
from expertmesh.experts import device_experts
from expertmesh.experts.mlp import LocalExpertMLP
from expertmesh.make_checkpoint import complete_config
from expertmesh.numerics import Numerics
from expertmesh.parallel_reads import Read, read_all
from expertmesh.router.placement import uniform

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
DEVICE = torch.device("cuda")
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "tie_word_embeddings": False,
}
QUANTIZATION = {
    "bf16": None,
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
}
EXPERT_BYTES = 2 * 3 * 512 * 256


@pytest.fixture(params=list(QUANTIZATION))
def noise(request, tmp_path):
    raw = complete_config(CONFIG)
    if QUANTIZATION[request.param]:
        raw["quantization_config"] = QUANTIZATION[request.param]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return DummyCheckpoint(tmp_path)


def load(checkpoint):
    weights = load_attention_weights(checkpoint, dtype=torch.bfloat16, device=DEVICE)
    experts = LocalExpertMLP(checkpoint, Numerics(), dtype=torch.bfloat16, device=DEVICE)
    experts.set_placement(uniform(2, 32, 1), 0)
    return weights, experts


@pytest.mark.parametrize("num_threads", [1, 6])
def test_files_become_what_the_noise_is_without_them(noise, monkeypatch, num_threads):
    monkeypatch.setattr(parallel_reads, "MAX_THREADS", num_threads)
    write_files(noise, DEVICE)
    monkeypatch.setattr(device_experts, "LOAD_BYTES", 10 * EXPERT_BYTES)  # several goes a layer
    read = load(Checkpoint(noise.folder))
    monkeypatch.setattr(device_experts, "LOAD_BYTES", 1 << 30)
    assert same(load(noise), read, CONFIG["num_experts_per_tok"])


def test_experts_loaded_by_the_hundred_multiply_as_on_a_cpu(noise):
    """From the very bytes: the CPU reads the files that the GPU wrote."""
    write_files(noise, DEVICE)
    files = Checkpoint(noise.folder)
    _, on_gpu = load(files)
    on_cpu = LocalExpertMLP(files, Numerics())
    on_cpu.set_placement(uniform(2, 32, 1), 0)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(64, 512, generator=generator).bfloat16()
    ids = torch.rand(64, 32, generator=generator).argsort(-1)[:, :4].int()
    got = on_gpu.forward(1, rows.to(DEVICE), ids.to(DEVICE)).reshape(-1, 512).float().cpu()
    expected = on_cpu.forward(1, rows.float(), ids)
    assert (got - expected).norm() < (6e-2 if is_fp8(noise) else 1e-2) * expected.norm()


def is_fp8(checkpoint):
    return any(name.endswith("weight_scale_inv") for name in checkpoint.names)


def test_reads_wait_for_the_stream_that_used_the_memory_before(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(complete_config(CONFIG)))
    noise = DummyCheckpoint(tmp_path)
    write_files(noise, DEVICE)
    files, name = Checkpoint(tmp_path), "model.embed_tokens.weight"
    shape = files.shape(name)
    dests = [torch.empty(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(8)]
    torch.cuda._sleep(200_000_000)  # some 0.1 s, behind which the fills below stand
    for dest in dests:
        dest.fill_(7.0)
    read_all(files, [Read(name, dest) for dest in dests], num_threads=4)
    truth = noise.read(name, shape, dtype=torch.bfloat16, device="cuda")
    assert all(torch.equal(dest, truth) for dest in dests)


def test_a_load_needs_its_pool_and_less_than_a_layer_beside_it(tmp_path):
    raw = complete_config(CONFIG | {"num_experts": 128, "hidden_size": 1024, "num_hidden_layers": 3})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    experts = LocalExpertMLP(DummyCheckpoint(tmp_path), Numerics(), dtype=torch.bfloat16, device=DEVICE)
    layer_bytes = 128 * 2 * 3 * 1024 * 256
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_experts, "LOAD_BYTES", layer_bytes // 8)
        experts.set_placement(uniform(3, 128, 1), 0)
    peak = torch.cuda.max_memory_allocated() - before
    assert experts.resident_bytes <= peak < experts.resident_bytes + layer_bytes


def test_noise_is_the_same_wherever_it_lands_on_the_device(noise):
    name = next(n for n in noise.names if "experts.7.down_proj" in n and n.rpartition(".")[2] in ("weight", "qweight"))
    shape = noise.shape(name)
    first = noise.as_stored(name, shape, device=DEVICE)
    stack = torch.empty(3, *shape, dtype=first.dtype, device=DEVICE)
    noise.read_into(name, stack[1])
    again = DummyCheckpoint(noise.folder).as_stored(name, shape, device=DEVICE)
    assert torch.equal(stack[1].view(torch.uint8), first.view(torch.uint8))
    assert torch.equal(again.view(torch.uint8), first.view(torch.uint8))
    assert noise.as_stored(name, shape, device=DEVICE).float().isfinite().all()
