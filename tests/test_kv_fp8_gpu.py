"""The GPU engine over KV in e4m3: the plain model's logits over the same KV, streams that company, chunks, preemption
and cached prefixes do not change, graphs that are what eager steps are, and a pool of twice the blocks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from expertmesh.bench.local_engine import LocalEngine
from expertmesh.checkpoint import Checkpoint
from expertmesh.cluster.attention.batch import ScheduledTokens, build
from expertmesh.cluster.attention.kv_cache import KVCache
from expertmesh.cluster.attention.sequence import Sequence
from expertmesh.config import CacheConfig, SchedulerConfig
from expertmesh.make_checkpoint import make_checkpoint
from expertmesh.request import EngineRequest, SamplingParams

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from expertmesh.cluster.attention.device_runner import DeviceRunner  # noqa: E402
from expertmesh.cluster.attention.model import Model  # noqa: E402

DENSE = {
    "model_type": "qwen3",
    "vocab_size": 2000,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "initializer_range": 0.05,
}
MOE = {
    **DENSE,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 256,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
CACHE = CacheConfig(num_blocks=2000, kv_dtype="fp8")


@pytest.fixture(scope="module", params=["moe", "dense"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_checkpoint(folder, MOE if request.param == "moe" else DENSE, seed=11, dtype="bfloat16")
    return folder


def engine_of(folder, cache=CACHE, batch_invariant=False, **scheduler):
    engine = LocalEngine(
        folder, cache=cache, device="cuda", batch_invariant=batch_invariant, scheduler=SchedulerConfig(**scheduler)
    )
    assert isinstance(engine.runner, DeviceRunner)
    assert engine.runner.attention.capturable
    assert {pages.dtype for layer in engine.runner.kv_pages for pages in layer} == {torch.float8_e4m3fn}
    return engine


def prompt_of(length, seed=0):
    return tuple(np.random.default_rng(seed).integers(0, 2000, length).tolist())


def request(name, prompt, max_tokens=24, **sampling):
    return EngineRequest(
        request_id=name, prompt_ids=tuple(prompt), sampling=SamplingParams(max_tokens=max_tokens, **sampling)
    )


def test_logits_are_the_plain_models_over_the_same_kv(tmp_path, monkeypatch):
    """Without experts, whose near ties may fall either way. Prompts of both attention kernels, and decodes after them;
    the plain model's KV holds the same roundings."""
    make_checkpoint(tmp_path, DENSE, seed=11, dtype="bfloat16")
    plain = Model.load(
        Checkpoint(tmp_path),
        dtype=torch.bfloat16,
        device="cuda",
        batch_invariant=False,
        kv_dtype=torch.float8_e4m3fn,
    )
    monkeypatch.setattr(DeviceRunner, "_capture", lambda self, key, bucket, step: None)
    rows = []
    with engine_of(tmp_path) as engine:
        engine.runner.prompt_graphs = None
        forward = engine.runner.model.forward

        def keep(*args, **options):
            logits = forward(*args, **options)
            rows.extend(logits.float().clone())
            return logits

        engine.runner.model.forward = keep
        for length in (1, 17, 130, 700):
            rows.clear()
            prompt = prompt_of(length, seed=length)
            (stream,) = engine.run([request(f"r{length}", prompt, max_tokens=4, num_logprobs=0)])
            expected = _read(plain, [*prompt, *stream.token_ids[:-1]])[length - 1 :]
            assert len(rows) == len(expected) == 4
            for ours, theirs in zip(rows, expected, strict=True):
                # A last bit of bf16 may round to another e4m3; KV in bf16 is 5e-2 away.
                assert (ours - theirs).norm() <= 3e-2 * theirs.norm()


def _read(model, tokens):
    """Logits of all tokens, read in one step."""
    sequence = Sequence.of(request("plain", tokens))
    KVCache(64, 16).admit(sequence.table, sequence.token_ids[: len(tokens)])
    batch = build([ScheduledTokens.next_of(sequence, len(tokens))], block_size=16, device=model.device)
    batch = replace(batch, logits_rows=torch.arange(len(tokens), device=model.device))
    return model.forward(batch, model.new_kv_cache(64), step=None)


def test_streams_are_the_same_with_and_without_graphs(folder, monkeypatch):
    requests = [request(f"r{i}", prompt_of(3 + 45 * i, seed=i), max_tokens=40) for i in range(7)]
    with engine_of(folder) as engine:
        captured = [s.token_ids for s in engine.run(requests)]
        assert engine.runner.num_replays > 20
        assert engine.books_balance
    monkeypatch.setattr(DeviceRunner, "_capture", lambda self, key, bucket, step: None)
    monkeypatch.setattr(DeviceRunner, "runs_ahead", False)
    with engine_of(folder) as engine:
        assert [s.token_ids for s in engine.run(requests)] == captured
        assert engine.runner.num_replays == 0


def test_in_batch_invariant_mode_company_chunks_preemption_and_cached_prefixes_change_no_token(folder):
    requests = [request(f"r{i}", prompt_of(5 + 37 * i, seed=i), max_tokens=40) for i in range(9)]

    def streams_of(engine):
        return [s.token_ids for s in engine.run(requests)]

    with engine_of(folder, batch_invariant=True, cache=replace(CACHE, enable_prefix_cache=False)) as one:
        alone = [one.run([r])[0].token_ids for r in requests]
    with engine_of(folder, batch_invariant=True, max_prefill_tokens_per_step=50) as engine:
        assert streams_of(engine) == alone
        again = engine.run([replace(r, request_id="again" + r.request_id) for r in requests])
        assert any(s.num_cached_tokens for s in again)
        assert [s.token_ids for s in again] == alone
    with engine_of(folder, batch_invariant=True, cache=replace(CACHE, num_blocks=60)) as tight:
        assert streams_of(tight) == alone
        assert tight.engine.scheduler.num_preemptions > 0


def test_the_pool_has_twice_the_blocks(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (8 << 30, 8 << 30))  # not all of the GPU
    sizes = {}
    for kv_dtype in ("bf16", "fp8"):
        cache = CacheConfig(kv_dtype=kv_dtype)
        engine = LocalEngine(folder, cache=cache, device="cuda", batch_invariant=False)
        sizes[kv_dtype] = engine.runner.num_blocks
        engine.mesh.close()
        del engine
        torch.cuda.empty_cache()
    assert sizes["fp8"] == pytest.approx(2 * sizes["bf16"], rel=0.05)
