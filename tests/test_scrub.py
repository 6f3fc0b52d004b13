"""Expert weights at rest: every flipped bit is found, named and repaired; what was never right is never used."""

import random

import numpy as np
import pytest
import torch

from expertmesh.checkpoint import Checkpoint
from expertmesh.errors import CheckpointError
from expertmesh.experts import mlp
from expertmesh.experts.mlp import LocalExpertMLP
from expertmesh.experts.scrub import Scrubber
from expertmesh.experts.truth import TOLERANCE, block_checksums
from expertmesh.make_checkpoint import make_checkpoint
from expertmesh.numerics import Numerics
from expertmesh.router.placement import Placement, uniform

NUM_EXPERTS, LAYERS = 8, (0, 2)
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 40,  # 20,480 and 10,240 bytes: whole blocks and a rest
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("scrub")
    make_checkpoint(folder, CONFIG, dtype="bfloat16")
    return Checkpoint(folder)


def make_shard(checkpoint, redundant=0):
    experts = LocalExpertMLP(checkpoint)
    experts.set_placement(uniform(3, NUM_EXPERTS, 1, redundant, moe_layers=LAYERS), 0)
    return experts


def flip(tensor, generator):
    data = tensor.view(-1).view(torch.uint8).numpy()
    bit = generator.randrange(8 * data.size)
    data[bit // 8] ^= 1 << bit % 8


def held(experts, layer_id):
    return dict(experts.resident_layers())[layer_id]


@pytest.mark.parametrize("num_bytes", [2, 16384, 16386, 40000])
def test_any_bit_of_a_tensor_changes_its_blocks_checksum(num_bytes):
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, num_bytes, dtype=np.uint8)).view(torch.bfloat16)
    before = block_checksums(data)
    for seed in range(50):
        other = data.clone()
        flip(other, random.Random(seed))
        assert (block_checksums(other) != before).sum() == 1


def test_every_flipped_bit_is_named_and_repaired(checkpoint):
    experts, generator = make_shard(checkpoint), random.Random(1)
    counts = np.zeros((3, NUM_EXPERTS), dtype=np.int64)
    scrubber = Scrubber(experts, count_rows=lambda: (1, counts))
    truth = {layer_id: held(experts, layer_id).w13.clone() for layer_id in LAYERS}
    assert scrubber.check_all() == []
    for i in range(40):
        layer_id, slot = LAYERS[i % 2], generator.randrange(NUM_EXPERTS)
        flip((held(experts, layer_id).w13 if i % 3 else held(experts, layer_id).w2)[slot], generator)
        counts[layer_id, slot] += i
        (fault,) = scrubber.check_all()
        assert (fault.layer_id, fault.expert, fault.slot, fault.num_rows) == (layer_id, slot, slot, i)
        assert fault.repaired_from == "disk"
        assert scrubber.check_all() == []
    assert all(held(experts, layer_id).w13.equal(truth[layer_id]) for layer_id in LAYERS)
    assert scrubber.num_faults == 40
    assert scrubber.suspect_spans == tuple((f.last_clean_at, f.found_at) for f in scrubber.faults)


def test_an_expert_that_computed_nothing_meanwhile_makes_nothing_suspect(checkpoint):
    experts = make_shard(checkpoint)
    version, counts = [1], np.zeros((3, NUM_EXPERTS), dtype=np.int64)
    scrubber = Scrubber(experts, count_rows=lambda: (version[0], counts))
    scrubber.check_all()
    held(experts, 0).w2[1].mul_(2)
    scrubber.check_all()
    assert (scrubber.num_faults, scrubber.suspect_spans) == (1, ())
    held(experts, 0).w2[1].mul_(2)
    version[0] = 2  # what the slot did under the placement before is not known any more
    scrubber.check_all()
    assert len(scrubber.suspect_spans) == 1


def test_a_copy_in_memory_is_taken_before_the_disk_and_a_damaged_copy_is_not(checkpoint):
    experts = make_shard(checkpoint, redundant=NUM_EXPERTS)
    layer = held(experts, 2)
    first, second = (slot for slot, logical in enumerate(layer.logical_ids) if logical == 3)
    scrubber = Scrubber(experts)
    layer.w2[first].mul_(2)
    (fault,) = scrubber.check_all()
    assert (fault.expert, fault.slot, fault.repaired_from) == (3, first, "memory")
    layer.w2[first].mul_(2)
    layer.w2[second].mul_(2)
    faults = scrubber.check_all()
    assert [(f.slot, f.repaired_from) for f in faults] == [(first, "disk"), (second, "memory")]


def test_what_cannot_be_repaired_is_said(checkpoint, monkeypatch):
    experts, reported = make_shard(checkpoint), []
    scrubber = Scrubber(experts, on_fault=reported.append)
    held(experts, 0).w13[5].mul_(2)

    def gone(*_):
        raise CheckpointError("the disk is gone")

    monkeypatch.setattr(experts.truths, "read", gone)
    (fault,) = scrubber.check_all()
    assert fault.repaired_from == ""
    assert "expert 5 of layer 0 (slot 5) was damaged" in str(fault)
    assert "not repaired" in str(fault)
    assert reported == [fault]


def test_the_thread_finds_damage_within_its_period(checkpoint):
    experts = make_shard(checkpoint)
    scrubber = Scrubber(experts, period_s=0.2, max_share=1.0)
    scrubber.start()
    try:
        held(experts, 2).w2[4, 3, 2] += 1
        while not scrubber.faults:
            rounds = scrubber.num_rounds
            assert rounds < 50, "rounds go by and the damage is not found"
            scrubber._stop.wait(0.05)
        assert (scrubber.faults[0].layer_id, scrubber.faults[0].expert) == (2, 4)
    finally:
        scrubber.stop()


# ---- before use


def test_damage_on_the_way_into_memory_is_read_again(checkpoint, monkeypatch):
    load = mlp.load_layer

    def damaged(*args, **kwargs):
        made = load(*args, **kwargs)
        made.w13[2, 1, 1] += 1
        return made

    monkeypatch.setattr(mlp, "load_layer", damaged)
    experts = make_shard(checkpoint)
    assert Scrubber(experts).check_all() == []


def test_an_expert_in_the_wrong_slot_is_noticed_and_mended(checkpoint, monkeypatch):
    load = mlp.load_layer

    def swapped(*args, **kwargs):
        made = load(*args, **kwargs)
        made.w13[[0, 1]] = made.w13[[1, 0]]
        return made

    monkeypatch.setattr(mlp, "load_layer", swapped)
    assert Scrubber(make_shard(checkpoint)).check_all() == []


def test_a_machine_that_computes_wrong_serves_nothing(checkpoint, monkeypatch):
    """The bytes are right; the golden rows are not."""
    rows = LocalExpertMLP._host_rows

    def wrong(self, experts, x, slot_ids):
        products = rows(self, experts, x, slot_ids).clone()
        if 7 in slot_ids:
            products[-1, 3] = torch.nextafter(products[-1, 3], torch.tensor(9e9))  # one bit of one value
        return products

    monkeypatch.setattr(LocalExpertMLP, "_host_rows", wrong)
    with pytest.raises(CheckpointError, match="expert 7 of layer 0"):
        make_shard(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_without_batch_invariance_golden_rows_may_differ_by_the_stated_tolerance(checkpoint, monkeypatch, dtype):
    rows, wrong_by = LocalExpertMLP._host_rows, [0.0]

    def wrong(self, experts, x, slot_ids):
        products = rows(self, experts, x, slot_ids).clone()
        products[-1, 3] += wrong_by[0] * products[-1].abs().max()
        return products

    monkeypatch.setattr(LocalExpertMLP, "_host_rows", wrong)

    def load():
        experts = LocalExpertMLP(checkpoint, Numerics(), dtype=dtype)
        experts.set_placement(uniform(3, NUM_EXPERTS, 1, moe_layers=LAYERS), 0)

    load()
    wrong_by[0] = TOLERANCE[dtype] / 4
    load()
    wrong_by[0] = TOLERANCE[dtype] * 3
    with pytest.raises(CheckpointError):
        load()


def test_a_copy_that_moves_is_judged_by_the_same_truth_without_the_disk(checkpoint, monkeypatch):
    experts = make_shard(checkpoint)
    monkeypatch.setattr(experts.truths, "_checkpoint", None)
    table = reversed_table()
    experts.set_placement(Placement(2, NUM_EXPERTS, 1, table), 0)
    experts.use_placement(2)
    assert Scrubber(experts).check_all() == []


def reversed_table():
    table = torch.full((3, NUM_EXPERTS), -1, dtype=torch.int32)
    for layer_id in LAYERS:
        table[layer_id] = torch.arange(NUM_EXPERTS - 1, -1, -1, dtype=torch.int32)
    return table
