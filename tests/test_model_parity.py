"""A small cut of `make parity`: the model against transformers, and against itself in every arrangement."""

import random

import pytest
import torch

from expertmesh.bench.configurations import CONFIGURATIONS
from expertmesh.bench.in_process import InProcessModel
from expertmesh.bench.parity import check, mixed, random_prompt
from expertmesh.cluster.attention.rope import RotaryTable
from expertmesh.make_checkpoint import make_checkpoint
from expertmesh.model_config import RopeConfig


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CUT = [CONFIGURATIONS[i] for i in (0, 1, 3, 5, 9)]


@pytest.mark.parametrize("configuration", CUT, ids=[c.name for c in CUT])
def test_model_is_exact(configuration):
    result = check(configuration, num_prompts=2, num_tokens=8, num_streams=8)
    assert not result.failures
    assert result.greedy_prompts == 2
    assert result.bit_checks > 0


def test_model_covers_every_arrangement_the_configurations_promise():
    names = " ".join(c.name for c in CONFIGURATIONS)
    assert len(CONFIGURATIONS) >= 8
    for promise in ("128 experts top-8", "dense", "YaRN", "tied", "fused", "mlp_only_layers", "decoder_sparse_step"):
        assert promise in names


def test_a_row_of_the_rotary_table_does_not_change_when_the_table_grows():
    table = RotaryTable(RopeConfig(theta=1e6), 32)
    before = [t.clone() for t in table.rows(torch.arange(1000))]
    table.rows(torch.tensor([70_000]))
    after = table.rows(torch.arange(1000))
    assert all(torch.equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_text_does_not_change_when_pages_are_dirty_or_scattered(tmp_path, kv_dtype):
    """What earlier streams left in the pages, NaN included, must not reach a later one."""
    make_checkpoint(tmp_path, CONFIGURATIONS[0].config, dtype="float32")
    generator = random.Random(0)
    prompts = [random_prompt(generator, length, 1000) for length in (5, 64, 100)]
    clean = mixed(InProcessModel(tmp_path, kv_dtype=kv_dtype), prompts, random.Random(1))
    dirty = InProcessModel(tmp_path, kv_dtype=kv_dtype)
    for k, v in dirty.kv_cache:
        k.fill_(float("nan"))
        v.fill_(float("nan"))
    generator.shuffle(dirty.free_blocks)
    again = mixed(dirty, prompts, random.Random(2))
    assert all(torch.equal(a, b) for a, b in zip(clean, again))


def test_a_token_without_a_slot_is_computed_but_not_written(tmp_path):
    make_checkpoint(tmp_path, CONFIGURATIONS[0].config, dtype="float32")
    model = InProcessModel(tmp_path)
    stream = model.open([3, 1, 4, 1, 5])
    batch = model._batch([(stream, 5)], all_rows=False)
    batch.slot_mapping[-1] = -1
    model.model.forward(batch, model.kv_cache, model.step())
    last_slot = stream.block_ids[0] * 16 + 4
    for k, _ in model.kv_cache:
        assert k.view(-1, k.shape[2], k.shape[3])[last_slot].abs().sum() == 0
        assert k.view(-1, k.shape[2], k.shape[3])[last_slot - 1].abs().sum() > 0
