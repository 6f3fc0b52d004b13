"""Many reads at once give what one after the other gives, and fail as one does."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertmesh.checkpoint import Checkpoint, ProgressMeter, _Staging
from expertmesh.errors import CheckpointError
from expertmesh.experts import device_experts
from expertmesh.experts.device_experts import DeviceExperts
from expertmesh.experts.weights import load_stack
from expertmesh.make_checkpoint import make_checkpoint
from expertmesh.parallel_reads import Read, read_all

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
BAD = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    make_checkpoint(tmp_path, CONFIG, dtype="float32", max_shard_bytes=20_000)
    return tmp_path


def reads_of(checkpoint, dtype):
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names}
    return {name: Read(name, torch.full(shape, 7.0, dtype=dtype)) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_read_what_one_reads(folder, dtype):
    checkpoint = Checkpoint(folder)
    one, many = reads_of(checkpoint, dtype), reads_of(checkpoint, dtype)
    total = sum(checkpoint.entry(name).num_bytes for name in one)
    meter = ProgressMeter("x", total, None)
    with torch.inference_mode():
        read_all(checkpoint, list(one.values()))
        read_all(checkpoint, list(many.values()), meter=meter, num_threads=5)
    assert all(torch.equal(one[name].dest, many[name].dest) for name in one)
    assert meter.bytes_read == total


def test_what_was_made_in_inference_mode_is_filled_in_it(folder):
    """In a thread without it, writing to such a tensor is an error."""
    checkpoint = Checkpoint(folder)
    with torch.inference_mode():
        reads = [Read(BAD, torch.empty(24, 32)) for _ in range(4)]
        read_all(checkpoint, reads, num_threads=2)
    assert all(torch.equal(read.dest, reads[0].dest) for read in reads)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_damaged_tensor_is_named(folder, num_threads):
    path = Checkpoint(folder).entry(BAD).file
    tensors = load_file(path)
    tensors[BAD][3, 4] = float("nan")
    save_file(tensors, path)
    checkpoint = Checkpoint(folder)
    with pytest.raises(CheckpointError, match="NaN or infinity") as caught:
        read_all(checkpoint, list(reads_of(checkpoint, torch.float32).values()), num_threads=num_threads)
    assert caught.value.tensor == BAD


def test_a_stack_holds_its_experts_in_order_from_single_and_fused_files(folder, tmp_path):
    make_checkpoint(tmp_path / "fused", CONFIG, dtype="float32", fused_experts=True)
    single, fused = (
        load_stack(Checkpoint(path), 1, [4, 0, 4], dtype=torch.float32, device="cpu")
        for path in (folder, tmp_path / "fused")
    )
    for a, b in zip(single, fused, strict=True):
        assert torch.equal(a, b)
    gate = Checkpoint(folder).read("model.layers.1.mlp.experts.4.gate_proj.weight", (24, 32), dtype=torch.float32)
    assert torch.equal(single[0][0, :24], gate)
    assert torch.equal(single[0][0], single[0][2])


def test_an_expert_is_the_same_however_many_are_loaded_at_once(folder, monkeypatch):
    rows, ids = torch.randn(5, 32), torch.tensor([[0, 5], [1, 2], [3, 4], [5, 0], [2, 3]], dtype=torch.int32)
    made = []
    for at_once in (1, 30_000, 1 << 30):  # one expert, four, all
        monkeypatch.setattr(device_experts, "LOAD_BYTES", at_once)
        held = DeviceExperts(Checkpoint(folder), dtype=torch.float32, device=torch.device("cpu"), kernels="torch")
        held.use({0: held.place(0, (0, 1, 2, 3, 4, 5), [])})
        made.append(held.rows(0, rows, ids))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_a_piece_is_staged_in_room_that_is_used_again():
    staging, target = _Staging(64, pinned=False), torch.zeros(4)
    for value in (1.0, 2.0):
        source = staging.take(16).view(torch.float32)
        source.fill_(value)
        staging.copy(source, target)
        assert (target == value).all()
    assert staging.take(8).data_ptr() == staging.take(16).data_ptr()
