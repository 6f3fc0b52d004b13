"""Reading slices into place, and every kind of broken checkpoint named by file, tensor and remedy."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertmesh.checkpoint import Checkpoint, ProgressMeter
from expertmesh.cluster.attention.model import Model
from expertmesh.errors import CheckpointError, ConfigError
from expertmesh.experts.mlp import LocalExpertMLP
from expertmesh.make_checkpoint import make_checkpoint
from expertmesh.router.placement import uniform

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"


@pytest.fixture
def folder(tmp_path):
    make_checkpoint(tmp_path, CONFIG, dtype="float32")
    return tmp_path


def rewrite(folder, change):
    """Load the one weight file, let `change` edit the tensors, write it again."""
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def load_all(folder):
    checkpoint = Checkpoint(folder)
    Model.load(checkpoint, batch_invariant=False)
    experts = LocalExpertMLP(checkpoint, Model.load(checkpoint, batch_invariant=False).numerics)
    experts.set_placement(uniform(2, 4, 1), 0)
    return experts


def test_a_whole_tensor_and_a_slice_are_read_into_place_with_conversion(folder):
    truth = load_file(folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    frame = torch.full((3, 8, 16), 7.0, dtype=torch.bfloat16)
    checkpoint.read_into(GATE, frame[1])
    assert torch.equal(frame[1], truth[GATE].bfloat16())
    assert (frame[0] == 7).all()
    assert (frame[2] == 7).all()
    row = torch.empty(16)
    checkpoint.read_into(GATE, row, index=5)
    assert torch.equal(row, truth[GATE][5])


def test_index_and_single_file_hold_the_same_model(folder, tmp_path):
    many = tmp_path / "many"
    made = make_checkpoint(many, CONFIG, dtype="float32", max_shard_bytes=5000)
    assert made.num_files > 2
    one, two = Checkpoint(folder), Checkpoint(many)
    assert set(one.names) == set(two.names)
    for name in one.names:
        shape = one.entry(name).shape
        assert torch.equal(one.read(name, shape, dtype=torch.float32), two.read(name, shape, dtype=torch.float32))


def test_fused_and_single_experts_give_the_same_tensors(folder, tmp_path):
    make_checkpoint(tmp_path / "fused", CONFIG, dtype="float32", fused_experts=True)
    single, fused = load_all(folder), load_all(tmp_path / "fused")
    for layer_id in (0, 1):
        for part in ("w13", "w2"):
            a = getattr(single._current.layers[layer_id], part)
            assert torch.equal(a, getattr(fused._current.layers[layer_id], part))


def test_a_tied_head_may_be_stored_or_absent_and_an_untied_one_must_be_there(tmp_path):
    make_checkpoint(tmp_path, CONFIG | {"tie_word_embeddings": True}, dtype="float32")
    absent = Model.load(Checkpoint(tmp_path), batch_invariant=False)
    assert absent.weights.lm_head is absent.weights.embed
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    stored = Model.load(Checkpoint(tmp_path), batch_invariant=False)
    assert stored.weights.lm_head is stored.weights.embed
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    rewrite(tmp_path, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_all(tmp_path)


def test_progress_counts_every_byte_and_reports_speed(folder):
    seen = []
    Model.load(Checkpoint(folder), batch_invariant=False, progress=seen.append)
    assert seen[-1].bytes_read == seen[-1].bytes_total > 0
    assert "MB/s" in str(seen[-1])


def test_progress_reports_at_most_once_an_interval():
    now, seen = [0.0], []
    meter = ProgressMeter("x", 100, seen.append, interval_s=1.0, clock=lambda: now[0])
    for _ in range(10):
        now[0] += 0.25
        meter.add(10)
    assert [p.bytes_read for p in seen] == [40, 80]
    assert meter.finish().bytes_per_s == 40.0


def test_missing_tensor_is_named(folder):
    rewrite(folder, lambda t: t.pop(GATE))
    with pytest.raises(CheckpointError, match="missing") as caught:
        load_all(folder)
    assert caught.value.tensor == GATE


def test_wrong_shape_is_named_with_both_shapes(folder):
    def change(tensors):
        tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(16, 31)

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=r"\[16, 31\].*\[16, 32\]") as caught:
        load_all(folder)
    assert caught.value.tensor == "model.layers.0.self_attn.o_proj.weight"
    assert caught.value.file.endswith("model.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_named(folder, bad):
    def change(tensors):
        tensors[GATE][3, 4] = bad

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match="NaN or infinity") as caught:
        load_all(folder)
    assert caught.value.tensor == GATE


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        load_all(folder)
    assert caught.value.file == str(path)
    assert "again" in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [b"not json!", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}'],
)
def test_damaged_header_is_named(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with pytest.raises(CheckpointError, match="header"):
        load_all(folder)


def test_missing_files_are_named(tmp_path):
    make_checkpoint(tmp_path, CONFIG, max_shard_bytes=5000)
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    second.unlink()
    with pytest.raises(CheckpointError, match="missing") as caught:
        Checkpoint(tmp_path)
    assert caught.value.file == str(second)
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        Checkpoint(tmp_path)


def test_index_naming_the_wrong_file_is_named(tmp_path):
    make_checkpoint(tmp_path, CONFIG, max_shard_bytes=5000)
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"][GATE] = raw["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="not in it") as caught:
        load_all(tmp_path)
    assert caught.value.tensor == GATE


def test_index_naming_a_file_elsewhere_is_refused(tmp_path):
    make_checkpoint(tmp_path / "model", CONFIG, max_shard_bytes=5000)
    index = tmp_path / "model" / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"][GATE] = "../other.safetensors"
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="not in the folder"):
        Checkpoint(tmp_path / "model")


def test_unsupported_dtype_is_named(folder):
    def change(tensors):
        tensors[GATE] = tensors[GATE].to(torch.int8)

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match="I8"):
        load_all(folder)


def test_make_checkpoint_is_seeded_and_never_mixes_two_models(tmp_path):
    a, b, c = (tmp_path / n for n in "abc")
    for folder, seed in ((a, 1), (b, 1), (c, 2)):
        make_checkpoint(folder, CONFIG, seed=seed)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert (a / "model.safetensors").read_bytes() != (c / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="without weights"):
        make_checkpoint(a, CONFIG)
    make_checkpoint(a, CONFIG, seed=2, overwrite=True)
    assert (a / "model.safetensors").read_bytes() == (c / "model.safetensors").read_bytes()
