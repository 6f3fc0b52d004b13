"""The engine on the real model: busy streams equal solo runs, and the prefix cache saves what it promises."""

import random
from dataclasses import replace

import pytest
import torch

from expertmesh.bench.in_process import InProcessModel
from expertmesh.bench.local_engine import LocalEngine
from expertmesh.bench.preemption import run as run_preemption
from expertmesh.checkpoint import Checkpoint
from expertmesh.cluster.attention.pace import Allowance
from expertmesh.cluster.attention.runner import (
    Runner,
    attention_weight_bytes,
    kv_dtype_of,
    size_kv_pool,
    tokenizer_vocab_size,
    warn_of_cut_keys,
)
from expertmesh.config import CacheConfig, SchedulerConfig
from expertmesh.errors import StartupError
from expertmesh.make_checkpoint import PRESETS, make_checkpoint
from expertmesh.request import EngineRequest, SamplingParams
from expertmesh.router.placement import Placement, uniform

SMALL = {**PRESETS["tiny-moe"], "vocab_size": 512, "num_experts": 16, "num_experts_per_tok": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)  # what batch-invariant mode stands on
    folder = tmp_path_factory.mktemp("engine-model")
    make_checkpoint(folder, SMALL, seed=3, dtype="float32")
    return folder


def greedy(name: str, prompt, max_tokens: int = 16) -> EngineRequest:
    sampling = SamplingParams(max_tokens=max_tokens)
    return EngineRequest(request_id=name, prompt_ids=tuple(prompt), sampling=sampling)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_64_mixed_requests_on_a_third_of_the_kv_equal_their_solo_runs(folder, kv_dtype):
    figures = run_preemption(folder, longest=24, block_size=4, kv_dtype=kv_dtype)
    assert figures["streams_that_differ"] == 0
    assert figures["preemptions"] > 0
    assert figures["all_blocks_free"]


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_second_turn_of_a_long_conversation_is_cached_and_the_same(folder, kv_dtype):
    prompt = [(i * 7919) % 500 for i in range(2000)]
    cache = CacheConfig(num_blocks=300, kv_dtype=kv_dtype)
    with LocalEngine(folder, cache=cache) as engine:
        first = engine.run([greedy("turn 1", prompt, 40)])[0]
        follow_up = prompt + first.token_ids + [1, 2, 3]
        second = engine.run([greedy("turn 2", follow_up)])[0]
        assert second.num_cached_tokens >= 2040 - cache.block_size
        assert engine.books_balance
    with LocalEngine(folder, cache=replace(cache, enable_prefix_cache=False)) as plain:
        assert plain.run([greedy("turn 2", follow_up)])[0].token_ids == second.token_ids


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_any_chunking_gives_the_same_tokens(folder, kv_dtype):
    cache = CacheConfig(num_blocks=100, kv_dtype=kv_dtype)
    prompts = [[(i * k) % 500 for i in range(40 + 9 * k)] for k in range(1, 6)]
    streams = []
    for chunk in (7, 64, 1024):
        scheduler = SchedulerConfig(max_num_batched_tokens=chunk + 8, max_prefill_tokens_per_step=chunk)
        with LocalEngine(folder, cache=cache, scheduler=scheduler) as engine:
            streams.append([s.token_ids for s in engine.run([greedy(f"r{k}", p) for k, p in enumerate(prompts)])])
    assert streams[0] == streams[1] == streams[2]


def test_chunks_beside_decodes_that_follow_the_clock_change_no_token(folder):
    """What a step may take is drawn anew for each, so that no two prompts are cut alike."""
    prompts = [[(i * k) % 500 for i in range(30 + 40 * k)] for k in range(1, 6)]
    requests = [greedy(f"r{k}", prompt, 30) for k, prompt in enumerate(prompts)]
    with LocalEngine(folder, cache=CacheConfig(num_blocks=100)) as one:
        alone = [one.run([r])[0].token_ids for r in requests]
    for seed in range(3):
        with LocalEngine(folder, cache=CacheConfig(num_blocks=100)) as engine:
            draw = random.Random(seed)
            engine.engine.scheduler.pace.allowance = lambda *_, draw=draw: Allowance(draw.choice((1, 7, 30, 90)), 50)
            streams = []
            for r in requests:
                streams.append(engine.submit(r))
                engine.wait_for_step_after_now()
            engine.wait([r.request_id for r in requests])
            assert [s.token_ids for s in streams] == alone
            assert engine.books_balance


def test_model_that_cannot_fit_is_refused_with_the_numbers(folder):
    checkpoint = Checkpoint(folder)
    with pytest.raises(StartupError, match=r"holds 0 blocks of 16 tokens .*raise cache.kv_memory_bytes"):
        Runner.load(checkpoint, CacheConfig(kv_memory_bytes=1000))
    with pytest.raises(StartupError, match=r"of weights and .* of KV \(1000000000 blocks\); .* are available"):
        Runner.load(checkpoint, CacheConfig(num_blocks=10**9))


@pytest.mark.parametrize(("kv_dtype", "num_blocks"), [("auto", 10), ("bf16", 20), ("fp8", 40)])
def test_pool_is_sized_from_its_bytes(folder, kv_dtype, num_blocks):
    config = Checkpoint(folder).config
    block_bytes = 16 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    cache = CacheConfig(kv_memory_bytes=10 * block_bytes + 5, kv_dtype=kv_dtype)
    stored = kv_dtype_of(cache, torch.float32)
    assert size_kv_pool(config, cache, kv_dtype=stored, weight_bytes=0, available_bytes=None) == num_blocks
    runner = Runner.load(Checkpoint(folder), cache)
    assert runner.num_blocks == num_blocks
    assert sum(k.nbytes + v.nbytes for k, v in runner.kv_pages) == 10 * block_bytes


def test_keys_that_fp8_may_cut_are_named(folder, caplog):
    runner = Runner.load(Checkpoint(folder), CacheConfig(num_blocks=2, kv_dtype="fp8"))
    assert "cuts them" not in caplog.text
    layers = list(runner.model.weights.layers)
    layers[1] = replace(layers[1], qk_norm=layers[1].qk_norm * 200)
    warn_of_cut_keys(replace(runner.model.weights, layers=tuple(layers)), runner.model.config, torch.float8_e4m3fn)
    assert "keys of layer 1 may reach" in caplog.text


def test_fp8_kv_changes_logits_by_its_rounding_alone(folder):
    """e4m3 has four bits fewer than bf16: so much larger is what it does to the logits of a token, and no more."""
    prompt = [(i * 7919) % 500 for i in range(200)]
    logits = {}
    for kv_dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        model = InProcessModel(folder, kv_dtype=kv_dtype)
        logits[kv_dtype] = model.run([(model.open(prompt), len(prompt))], all_rows=True)[0]
    exact = logits.pop(torch.float32)
    rows = {kv_dtype: (found - exact).norm(dim=1) / exact.norm(dim=1) for kv_dtype, found in logits.items()}
    bf16, fp8 = (float(rows[kv_dtype].median()) for kv_dtype in (torch.bfloat16, torch.float8_e4m3fn))
    assert 0 < bf16 < 1e-2
    assert 8 < fp8 / bf16 < 32


def test_only_ids_of_the_tokenizer_are_sampled(folder, tiny_checkpoint):
    assert tokenizer_vocab_size(Checkpoint(tiny_checkpoint)) == 151669
    assert tokenizer_vocab_size(Checkpoint(folder)) == 512


def test_placement_may_change_at_any_step_boundary_under_running_streams(folder):
    prompts = [[(i * k) % 500 for i in range(30)] for k in range(1, 9)]
    requests = [greedy(f"r{k}", prompt, 24) for k, prompt in enumerate(prompts)]
    with LocalEngine(folder, cache=CacheConfig(num_blocks=100)) as engine:
        undisturbed = [s.token_ids for s in engine.run(requests)]
    with LocalEngine(folder, cache=CacheConfig(num_blocks=100)) as engine:
        config = Checkpoint(folder).config
        streams = [engine.submit(request) for request in requests]
        for version in range(2, 6):
            table = uniform(config.num_layers, config.num_experts, 1).physical_to_logical.flip(1).roll(version, 1)
            engine.mesh.change_placement(Placement(version, config.num_experts, 1, table))
            engine.wait_for_step_after_now()
        engine.wait([r.request_id for r in requests])
        assert engine.mesh.epoch.number > 1
        assert [s.token_ids for s in streams] == undisturbed


def test_weight_bytes_are_those_that_are_loaded(folder):
    weights = Runner.load(Checkpoint(folder), CacheConfig(num_blocks=2)).model.weights
    tensors = [weights.embed, weights.norm, weights.lm_head]
    for layer in weights.layers:
        tensors += [t for t in (layer.qkv, layer.o, layer.gate, layer.w13, layer.w2) if t is not None]
    loaded = sum(t.nbytes for t in {id(t): t for t in tensors}.values())
    assert attention_weight_bytes(Checkpoint(folder).config, torch.float32) == pytest.approx(loaded, rel=0.01)
