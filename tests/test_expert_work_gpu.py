"""What the experts' kernels note of their own work: rows of each expert, and the time that they took. In every form of
the products, in graphs, alone and behind a peer that is late; then of real shards behind a real engine."""

import random
import time

import exchange_emulated
import pytest
import torch

from expertmesh.bench.member_world import MemberWorld, WorldOptions
from expertmesh.bench.step_cases import CASES
from expertmesh.checkpoint import Checkpoint
from expertmesh.cluster.membership import uniform_place
from expertmesh.config import ExchangeConfig, SchedulerConfig
from expertmesh.experts.mlp import LocalExpertMLP
from expertmesh.kernels.expert_layer import ExpertLayer
from expertmesh.kernels.expert_work import ExpertWork
from expertmesh.make_checkpoint import make_checkpoint
from expertmesh.request import EngineRequest, SamplingParams
from expertmesh.router.epoch import Epoch, Member, StepHeader
from expertmesh.router.exchange import RowShape
from expertmesh.router.local_mesh import LocalMesh
from expertmesh.router.placement import Placement, uniform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
GPU = torch.device("cuda", 0)
NUM_EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 16, 2048, 768, 8


def make_layer(form):
    generator = torch.Generator(device=GPU).manual_seed(1)
    w13 = torch.randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, device=GPU, generator=generator) * 0.02
    w2 = torch.randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE, device=GPU, generator=generator) * 0.02
    if form == "bf16":
        return ExpertLayer(w13.bfloat16(), w2.bfloat16(), kernels="cuda")
    scales = [torch.full((NUM_EXPERTS, *(n // 128 for n in w.shape[1:])), 0.01, device=GPU) for w in (w13, w2)]
    w13, w2 = (w13.mul(100).to(torch.float8_e4m3fn), w2.mul(100).to(torch.float8_e4m3fn))
    return ExpertLayer(w13, w2, *scales, kernels="cuda", form=form)


def draw(num_rows, seed=1, holes=0.0):
    generator = torch.Generator(device=GPU).manual_seed(seed)
    x = torch.randn(num_rows, HIDDEN, device=GPU, generator=generator).bfloat16()
    ids = torch.rand(num_rows, NUM_EXPERTS, device=GPU, generator=generator).argsort(-1)[:, :TOP_K]
    ids = torch.where(torch.rand(ids.shape, device=GPU, generator=generator) < holes, -1, ids)
    return x, ids.to(torch.int32)


def counted(ids):
    return torch.bincount(ids.flatten().long().cpu() + 1, minlength=NUM_EXPERTS + 1)[1:].tolist()


class Products:
    """Twenty products of the same rows in one graph."""

    def __init__(self, layer, num_rows, between=lambda: None):
        self.work, (x, ids) = ExpertWork(1, GPU), draw(num_rows)
        layer.rows(x, ids, work=self.work.of(0))
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(20):
                between()
                layer.rows(x, ids, work=self.work.of(0))

    def run(self):
        """(seconds noted, seconds between events around)."""
        self.graph.replay()
        torch.cuda.synchronize()
        before, (start, end) = self.work.busy_s(), (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return self.work.busy_s() - before, 1e-3 * start.elapsed_time(end)


@pytest.mark.parametrize("form", ["bf16", "fp8", "w8a16"])
@pytest.mark.parametrize("num_rows", [1, 60, 100, 200, 3000])  # one launch: few pairs, more; two; 8 CTAs
def test_rows_of_each_expert_are_added_up(form, num_rows):
    layer, work = make_layer(form), ExpertWork(2, GPU)
    work.count_for(1)
    places = torch.arange(NUM_EXPERTS - 1, -1, -1, dtype=torch.int32, device=GPU)
    (x, ids), plain = draw(num_rows, holes=0.3), work.of(1)
    wanted = layer.rows(x, ids)
    assert torch.equal(layer.rows(x, ids, work=plain)[ids >= 0], wanted[ids >= 0])
    layer.rows(x, torch.full_like(ids, -1), work=plain)
    layer.rows(x, ids, work=plain)
    layer.rows(x, ids, expert_map=places, work=work.of(0))
    torch.cuda.synchronize()
    rows = work.rows(1)
    assert rows[1, :NUM_EXPERTS].tolist() == [2 * n for n in counted(ids)]
    assert rows[0, :NUM_EXPERTS].tolist() == counted(ids)[::-1]
    assert not rows[:, NUM_EXPERTS:].any()
    assert work.busy_s() > 0


@pytest.mark.parametrize("form", ["bf16", "fp8", "w8a16"])
def test_a_hundred_times_the_rows_are_accordingly_more_busy_time(form):
    layer = make_layer(form)
    few, passed_few = Products(layer, 60).run()
    many, passed_many = Products(layer, 6000).run()
    assert 0.4 * passed_few < few < 1.02 * passed_few
    assert 0.8 * passed_many < many < 1.02 * passed_many
    assert many > 5 * few


def test_products_without_rows_and_waits_between_products_are_not_busy():
    layer = make_layer("bf16")
    busy, passed = Products(layer, 60, between=lambda: torch.cuda._sleep(1_000_000)).run()  # 0.5 ms each
    assert 0 < busy < 0.2 * passed
    work, (x, ids) = ExpertWork(1, GPU), draw(60)
    for _ in range(5):
        layer.rows(x, torch.full_like(ids, -1), work=work.of(0))
    torch.cuda.synchronize()
    assert work.busy_s() == 0.0


def test_a_shard_that_waits_for_a_late_peer_is_not_busy():
    members = (Member(member_id="a", attention=True, expert=False), Member(member_id="e", attention=False, expert=True))
    epoch = Epoch(number=1, members=members, placement=uniform(1, NUM_EXPERTS, 1))
    shape = RowShape(hidden_size=HIDDEN, top_k=TOP_K, dtype=torch.bfloat16, device=GPU)
    source, owner = exchange_emulated.peers_of_one_gpu(epoch, shape, 64)
    layer, work, (x, ids) = make_layer("bf16"), ExpertWork(1, GPU), draw(40)
    for exchange in (source, owner):
        exchange.use_placement(epoch.placement)
    nothing = x.new_empty(0, TOP_K, HIDDEN)
    layer.rows(x, ids, expected_pairs=320, work=work.of(0))  # loads what may not be loaded while a kernel waits
    torch.cuda._sleep(1)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    early, late = torch.cuda.Stream(), torch.cuda.Stream()
    before = work.busy_s()
    header = StepHeader(step_id=1, epoch=1, placement_version=1, num_tokens=(40, 0))
    with torch.cuda.stream(late):
        source.begin(header, stride=40, attempt=0)
    with torch.cuda.stream(early):
        owner.begin(header, stride=40, attempt=0)
        start.record()
    for _ in range(8):
        with torch.cuda.stream(early):
            owner.combine(layer.rows(*owner.dispatch(0, None, None, 40), expected_pairs=320, work=work.of(0)))
        with torch.cuda.stream(late):
            torch.cuda._sleep(4_000_000)  # 2 ms
            source.dispatch(0, x, ids, 40)
            source.combine(nothing)
    with torch.cuda.stream(early):
        end.record()
        owner.end()
    with torch.cuda.stream(late):
        source.end()
    torch.cuda.synchronize()
    assert (source.verdict().bad, owner.verdict().bad) == ((), ())
    assert 0 < work.busy_s() - before < 0.2 * 1e-3 * start.elapsed_time(end)


# ------------------------------------------------------------------------------------------------- in steps of a mesh
def test_a_rank_alone_counts_its_rows_in_graphs_and_anew_in_each_placement(tmp_path):
    num_layers, hidden, top_k = 2, 256, 4
    config = {
        "model_type": "qwen3_moe",
        "vocab_size": 64,
        "hidden_size": hidden,
        "intermediate_size": 128,
        "moe_intermediate_size": 128,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": top_k,
    }
    make_checkpoint(tmp_path, config, dtype="bfloat16")
    shape = RowShape(hidden_size=hidden, top_k=top_k, dtype=torch.bfloat16, device=GPU)
    experts = LocalExpertMLP(Checkpoint(tmp_path), dtype=torch.bfloat16, device=GPU)
    mesh, headers = LocalMesh(experts, uniform(num_layers, NUM_EXPERTS, 1), shape, buckets=(8,)), []
    mesh.start(headers.append)
    x = torch.randn(8, hidden, device=GPU).bfloat16()
    ids = torch.rand(8, NUM_EXPERTS, device=GPU).argsort(1)[:, :top_k].to(torch.int32)
    ids[7] = -1
    wanted = torch.tensor(counted(ids))
    graph = torch.cuda.CUDAGraph()

    def step(run):
        mesh.bid(8, 0)
        made = mesh.enter(headers.pop())
        run(made)
        made.settle()

    def eagerly(made):
        for layer_id in range(num_layers):
            made.rows(layer_id, x, ids)

    def captured(made):
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            eagerly(made)
        made.captured(graph)
        replayed(made)

    def replayed(made):
        graph.replay()
        made.replayed()

    for run in (eagerly, captured, replayed, replayed):
        step(run)
    version, rows = mesh.load()
    assert (version, rows.tolist()) == (1, [(4 * wanted).tolist()] * num_layers)
    busy_s = experts.busy_s()
    assert busy_s > 0
    turned = uniform(num_layers, NUM_EXPERTS, 1).physical_to_logical.flip(1)
    mesh.change_placement(Placement(2, NUM_EXPERTS, 1, turned))
    step(eagerly)
    version, rows = mesh.load()
    assert (version, rows.tolist()) == (2, [wanted.flip(0).tolist()] * num_layers)
    assert experts.busy_s() > busy_s
    mesh.close()


@pytest.mark.skipif(NUM_GPUS < 2, reason="needs 2 GPUs: processes take one in turns, which counts as time of both")
@pytest.mark.parametrize(("layout", "backend"), [("shard", "peer"), ("shard", "nccl"), ("colocated", "peer")])
def test_a_real_shard_is_as_busy_as_its_work(layout, backend, capsys):
    """Idle, one short stream, then 32 with prompts, in captured steps: what every owner of experts says of itself."""
    roles = ["attention", "expert"] if layout == "shard" else ["colocated", "colocated"]
    owners = [f"rank{rank}" for rank, role in enumerate(roles) if role != "attention"]
    num_attention = sum(role != "expert" for role in roles)
    num_layers, num_experts = 2, CASES["30b"]["num_experts"]
    options = WorldOptions(
        num_layers=num_layers,
        exchange=ExchangeConfig(backend=backend, timeout_base_s=30.0, timeout_per_row_s=0.0),
        scheduler=SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=512),
    )

    def stream(name, prompt):
        ids = tuple(random.Random(name).choices(range(CASES["30b"]["vocab_size"]), k=prompt))
        return EngineRequest(request_id=name, prompt_ids=ids, sampling=SamplingParams(max_tokens=33))

    def work():
        found = [world.ask(name, "work") for name in owners]
        return found[0][0], sum(busy_s for _, busy_s, _ in found) / len(owners), sum(rows for _, _, rows in found)

    def window(run):
        before = work()
        run()
        after = work()
        return [b - a for a, b in zip(before, after, strict=True)]

    place = uniform_place(num_layers, num_experts, 0)
    with MemberWorld(options, num_attention=num_attention, num_expert=len(owners), place=place) as world:
        for rank, role in enumerate(roles):
            world.start(f"rank{rank}", role, rank)
        world.wait_for_epoch([f"rank{rank}" for rank in range(len(roles))])
        for turn in ("first", "captured"):  # what is compiled, loaded and allocated between two launches would count
            world.wait(world.submit("rank0", [stream(f"{turn}-{i}", 300) for i in range(32)]))
            world.wait(world.submit("rank0", [stream(f"{turn}-one", 9)]))
        idle = window(lambda: time.sleep(0.3))
        light = window(lambda: world.wait(world.submit("rank0", [stream("light", 9)])))
        heavy = window(lambda: world.wait(world.submit("rank0", [stream(f"heavy-{i}", 300) for i in range(32)])))
    with capsys.disabled():
        for name, (passed_s, busy_s, rows) in (("idle", idle), ("1 stream", light), ("32 streams", heavy)):
            print(f"\n{layout} {backend} {name}: {rows} rows, busy {busy_s * 1e3:.2f} of {passed_s * 1e3:.0f} ms")
    assert idle[1:] == [0.0, 0]
    for rows, num_tokens in ((light[2], 9 + 32), (heavy[2], 32 * (300 + 32))):
        assert 1.0 <= rows / (num_tokens * TOP_K * num_layers) < 1.1  # a step may run again
    assert heavy[1] > 5 * light[1]
    assert 0 < light[1] < 0.5 * light[0]
    assert heavy[1] < heavy[0]
