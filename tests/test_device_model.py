"""The GPU engine's model, its kernels replaced by their plain references, is the plain model."""

import pytest
import torch

from expertmesh.bench.configurations import CONFIGURATIONS
from expertmesh.checkpoint import Checkpoint
from expertmesh.cluster.attention import device_model, prompt_graphs
from expertmesh.cluster.attention.batch import ScheduledTokens, build
from expertmesh.cluster.attention.device_model import DeviceBatch, DeviceModel
from expertmesh.cluster.attention.kv_cache import KVCache
from expertmesh.cluster.attention.model import Model
from expertmesh.cluster.attention.products import PlainProducts
from expertmesh.cluster.attention.prompt_graphs import PromptGraphs
from expertmesh.cluster.attention.sequence import Sequence
from expertmesh.experts.weights import load_layer
from expertmesh.kernels import attention_reference, reference
from expertmesh.make_checkpoint import make_checkpoint
from expertmesh.request import EngineRequest, SamplingParams

BLOCK = 4


@pytest.fixture
def plain_operations(monkeypatch):
    """The kernels' contracts in plain torch: residuals change in place, the gate can be told of padding."""

    def add_rms_norm(x, residual, weight, eps, *, out):
        total, normed = attention_reference.add_rms_norm(x, residual, weight, eps)
        residual.copy_(total)
        out.copy_(normed)

    def combine_add_rms_norm(y, weights, residual, weight, eps, *, ids, out):
        total, normed = attention_reference.combine_add_rms_norm(y, weights, residual, weight, eps, ids)
        residual.copy_(total)
        out.copy_(normed)

    def gate_topk(logits, top_k, *, renormalize, num_valid):
        ids, weights = reference.gate_topk(logits, top_k, renormalize=renormalize)
        if num_valid is not None:
            ids[int(num_valid) :] = -1
        return ids, weights

    def embed_rms_norm(table, token_ids, weight, eps, *, last_token=None):
        last_token = torch.zeros(1, dtype=torch.int64) if last_token is None else last_token
        return attention_reference.embed_rms_norm(table, token_ids, last_token, weight, eps)

    def qk_norm_rope(*args, out, **options):
        out.copy_(attention_reference.qk_norm_rope(*args, **options))

    for name, function in {
        "add_rms_norm": add_rms_norm,
        "combine_add_rms_norm": combine_add_rms_norm,
        "gate_topk": gate_topk,
        "embed_rms_norm": embed_rms_norm,
        "qk_norm_rope": qk_norm_rope,
        "silu_mul": lambda gate_up, *, out: out.copy_(attention_reference.silu_mul(gate_up)),
    }.items():
        monkeypatch.setattr(device_model, name, function)


class Experts:
    """All experts of a checkpoint, as a step gives them to either model."""

    def __init__(self, checkpoint):
        self.layers = {
            i: load_layer(checkpoint, i, range(checkpoint.config.num_experts), dtype=torch.bfloat16)
            for i in checkpoint.config.moe_layer_ids
        }
        self.routed = []

    def rows(self, layer_id, x, topk_ids):
        self.routed.append(topk_ids)
        layer = self.layers[layer_id]
        return reference.expert_rows(x, topk_ids, layer.w13, layer.w2).to(x.dtype)

    def moe(self, layer_id, x, topk_ids, topk_weights):
        return reference.combine(self.rows(layer_id, x, topk_ids), topk_ids, topk_weights).to(x.dtype)


class Attention:
    """The plain model's attention, planned for one batch."""

    whole = None

    def __init__(self, plain, batch):
        self.plain, self.planned = plain, plain.plan(batch)

    def attend(self, q, k_cache, v_cache, out):
        out.copy_(self.plain.attend(self.planned, q, k_cache, v_cache))


def steps_of(vocab_size, lengths, num_decodes):
    """Scheduled tokens of a prompt step, then of decodes, with KV tables."""
    cache = KVCache(64, BLOCK)
    sequences = []
    generator = torch.Generator().manual_seed(3)
    for i, length in enumerate(lengths):
        prompt = tuple(torch.randint(vocab_size, (length,), generator=generator).tolist())
        sequence = Sequence.of(EngineRequest(request_id=f"r{i}", prompt_ids=prompt, sampling=SamplingParams()))
        cache.admit(sequence.table, sequence.token_ids[:length])
        sequences.append(sequence)
    for _ in range(1 + num_decodes):
        scheduled = [ScheduledTokens.next_of(s, s.num_pending_tokens) for s in sequences]
        yield scheduled
        for sequence in sequences:
            sequence.num_computed_tokens = sequence.num_tokens
            sequence.expect()
            sequence.see(int(torch.randint(vocab_size, (1,), generator=generator)))
            cache.grow(sequence.table, sequence.num_tokens)


class WideProducts(PlainProducts):
    """More rows than tokens, as in batch-invariant mode; those that nobody asked for must not matter."""

    def padded(self, num_rows):
        return -(-num_rows // 16) * 16


@pytest.mark.parametrize("products", [PlainProducts(), WideProducts()], ids=["plain", "padded"])
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: c.name)
def test_it_is_the_plain_model(configuration, products, tmp_path, plain_operations):
    make_checkpoint(tmp_path, configuration.config, seed=5, **{"dtype": "bfloat16", **configuration.checkpoint})
    checkpoint = Checkpoint(tmp_path)
    vocab_size = checkpoint.config.vocab_size
    plain = Model.load(checkpoint, dtype=torch.bfloat16, block_size=BLOCK, batch_invariant=False)
    ours = DeviceModel.load(checkpoint, device="cpu", max_model_len=256, block_size=BLOCK)
    ours.products = products
    experts = Experts(checkpoint)
    pages, our_pages = plain.new_kv_cache(64), ours.new_kv_cache(64)
    for scheduled in steps_of(vocab_size, (1, 9, 30), num_decodes=2):
        batch = build(scheduled, block_size=BLOCK)
        expected = plain.forward(batch, pages, experts)
        attention = Attention(plain.attention, batch)
        device_batch = DeviceBatch(
            token_ids=batch.token_ids,
            positions=batch.positions,
            slot_mapping=batch.slot_mapping,
            logits_rows=batch.logits_rows,
        )
        logits = ours.forward(device_batch, our_pages, experts, attention).float()
        assert (logits - expected).norm() <= 2e-2 * expected.norm()
        assert logits.argmax(-1).equal(expected.argmax(-1))


def test_padding_is_routed_nowhere_and_unseen_tokens_are_the_slots_last_ones(tmp_path, plain_operations):
    configuration = next(c for c in CONFIGURATIONS if c.config["model_type"] == "qwen3_moe")
    make_checkpoint(tmp_path, configuration.config, seed=5, **{"dtype": "bfloat16", **configuration.checkpoint})
    checkpoint = Checkpoint(tmp_path)
    plain = Model.load(checkpoint, dtype=torch.bfloat16, block_size=BLOCK, batch_invariant=False)
    ours = DeviceModel.load(checkpoint, device="cpu", max_model_len=256, block_size=BLOCK)
    experts = Experts(checkpoint)
    (scheduled,) = steps_of(checkpoint.config.vocab_size, (1, 1), num_decodes=0)
    batch = build(scheduled, block_size=BLOCK)
    expected = plain.forward(batch, plain.new_kv_cache(64), experts)

    def padded(tensor, value):
        return torch.cat([tensor, tensor.new_full((1,), value)])

    experts.routed.clear()
    last_token = torch.tensor([0, 0, int(batch.token_ids[1])])
    device_batch = DeviceBatch(
        token_ids=torch.tensor([int(batch.token_ids[0]), -1 - 2, 0]),
        positions=padded(batch.positions, 0),
        slot_mapping=padded(batch.slot_mapping, -1),
        num_valid=torch.tensor([2], dtype=torch.int32),
    )

    class Padded(Attention):
        def attend(self, q, k_cache, v_cache, out):
            super().attend(q[:2], k_cache, v_cache, out[:2])
            out[2:] = 0

    pages = ours.new_kv_cache(64)
    logits = ours.forward(device_batch, pages, experts, Padded(plain.attention, batch), last_token=last_token)
    assert (logits[:2].float() - expected).norm() <= 2e-2 * expected.norm()
    assert all((ids[2] == -1).all() for ids in experts.routed)
    written = sum(int(k.view(-1, k.shape[2] * k.shape[3]).any(-1).sum()) for k, _ in pages)
    assert written == 2 * checkpoint.config.num_layers


class Step(Experts):
    """A step whose work may be captured."""

    graph_key = ("exchange", 0)
    num_replayed = 0

    def replayed(self):
        self.num_replayed += 1


class Replayed:
    """In place of a CUDA graph."""

    def __init__(self, replay):
        self.replay = replay


@pytest.fixture
def moe_models(tmp_path, plain_operations):
    configuration = next(c for c in CONFIGURATIONS if c.config["model_type"] == "qwen3_moe")
    make_checkpoint(tmp_path, configuration.config, seed=5, **{"dtype": "bfloat16", **configuration.checkpoint})
    checkpoint = Checkpoint(tmp_path)
    plain = Model.load(checkpoint, dtype=torch.bfloat16, block_size=BLOCK, batch_invariant=False)
    return plain, DeviceModel.load(checkpoint, device="cpu", max_model_len=256, block_size=BLOCK), Step(checkpoint)


def padded_to(bucket, batch):
    def padded(tensor, value):
        return torch.cat([tensor, tensor.new_full((bucket - len(tensor),), value)])

    return DeviceBatch(
        token_ids=padded(batch.token_ids, 0),
        positions=padded(batch.positions, 0),
        slot_mapping=padded(batch.slot_mapping, -1),
        num_valid=torch.tensor([batch.num_tokens], dtype=torch.int32),
    )


@pytest.mark.parametrize("products", [PlainProducts(), WideProducts()], ids=["plain", "padded"])
def test_a_prompt_step_padded_to_its_bucket_is_that_step(moe_models, products):
    plain, ours, step = moe_models
    ours.products = products
    pages, our_pages = plain.new_kv_cache(64), ours.new_kv_cache(64)
    last_token = torch.zeros(1, dtype=torch.int64)
    for scheduled in steps_of(ours.config.vocab_size, (1, 9, 30), num_decodes=1):
        batch = build(scheduled, block_size=BLOCK)
        expected = plain.forward(batch, pages, step)
        graphs = PromptGraphs(ours, our_pages, Attention(plain.attention, batch), pool=None, stream=None)
        step.routed.clear()
        x, replayed = graphs.run(padded_to(64, batch), batch.num_tokens, step, last_token)
        logits = ours.logits(x, batch.logits_rows, 64).float()
        assert not replayed
        assert (logits - expected).norm() <= 2e-2 * expected.norm()
        assert logits.argmax(-1).equal(expected.argmax(-1))
        assert all((ids[batch.num_tokens :] == -1).all() for ids in step.routed)


def test_a_bucket_is_captured_when_it_is_met_again_and_held_for_its_key(moe_models, monkeypatch):
    plain, ours, step = moe_models
    (scheduled,) = steps_of(ours.config.vocab_size, (1, 9), num_decodes=0)
    batch = build(scheduled, block_size=BLOCK)
    attention = Attention(plain.attention, batch)
    graphs = PromptGraphs(ours, ours.new_kv_cache(64), attention, pool=None, stream=None)
    order = []

    def capture(key, line, _step):
        pieces = [Replayed(lambda i=i: order.append(i)) for i in range(ours.config.num_layers + 1)]
        graphs._captured[key] = prompt_graphs._Captured(pieces, torch.zeros(1))
        return graphs._captured[key]

    monkeypatch.setattr(graphs, "_capture", capture)
    monkeypatch.setattr(attention, "attend", lambda q, *_, out: order.append((len(q), len(out))))

    def run(bucket):
        order.clear()
        return graphs.run(padded_to(bucket, batch), 10, step, torch.zeros(1, dtype=torch.int64))[1]

    assert [run(16), run(16), run(16), run(32), run(32)] == [False, True, True, False, True]
    layers = range(ours.config.num_layers)
    assert order == [0, *(part for i in layers for part in ((10, 10), i + 1))], "attention for the real tokens alone"
    assert (step.num_replayed, graphs.num_replays) == (3, 3)
    step.graph_key = ("exchange", 1)
    assert not run(16)
    step.graph_key = None
    assert [run(16), run(16)] == [False, False]


def test_a_rank_pads_to_what_holds_its_own_tokens():
    assert [prompt_graphs.bucket_of(n, 512) for n in (1, 16, 17, 300, 512)] == [16, 16, 32, 384, 512]
    assert prompt_graphs.bucket_of(20, 24) == 24, "never above the largest source's"
    assert [prompt_graphs.bucket_of(n, 2048) for n in (1056, 2048, 2049)] == [1152, 2048, 0]
    assert prompt_graphs.bucket_of(20, 0) == 0
