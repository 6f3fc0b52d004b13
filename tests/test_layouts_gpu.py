"""Batch-invariant mode on GPUs: a request's tokens are the same from one engine, from colocated ranks and from an
attention rank whose experts are elsewhere, alone or in company, from cached prefixes and after preemptions."""

import random

import pytest
import torch

from expertmesh.bench.local_engine import LocalEngine
from expertmesh.bench.member_world import MemberWorld, WorldOptions
from expertmesh.bench.step_cases import CASES, open_case
from expertmesh.cluster.membership import uniform_place
from expertmesh.config import CacheConfig, ExchangeConfig, SchedulerConfig
from expertmesh.request import EngineRequest, SamplingParams
from expertmesh.router.mesh import ClusterMesh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
BACKENDS = ["peer", pytest.param("nccl", marks=pytest.mark.skipif(NUM_GPUS < 2, reason="needs 2 GPUs"))]
LAYOUTS = {"colocated": (["colocated", "colocated"], 2, 2, 1), "disaggregated": (["attention", "expert"], 1, 1, 0)}


def requests_of(run: str, vocab_size: int, num_tokens: int) -> list[EngineRequest]:
    """Eight that share the first 80 tokens of their prompts; every second one is sampled."""
    shared = random.Random(1).choices(range(vocab_size), k=80)
    return [
        EngineRequest(
            request_id=f"{run}-{i}",
            prompt_ids=(*shared, *random.Random(10 + i).choices(range(vocab_size), k=3 + 29 * i)),
            sampling=SamplingParams(max_tokens=num_tokens, temperature=0.8 * (i % 2), seed=i),
        )
        for i in range(8)
    ]


def check_layout(
    folder, layout: str, *, case="30b", num_layers=4, num_tokens=48, device="cuda", backend="peer", mesh=ClusterMesh
):
    """Tokens of a solo run beside those of all requests at once on every attention rank, twice, with little KV."""
    roles, num_attention, num_expert, is_colocated = LAYOUTS[layout]
    vocab_size, num_experts = CASES[case]["vocab_size"], CASES[case]["num_experts"]
    checkpoint = open_case(case, folder, num_layers=num_layers)
    scheduler = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=512)
    alone = LocalEngine(
        checkpoint,
        cache=CacheConfig(num_blocks=200, enable_prefix_cache=False),
        scheduler=scheduler,
        device=device,
        max_model_len=4096,
    )
    with alone:
        truth = [alone.run([r])[0].token_ids for r in requests_of("alone", vocab_size, num_tokens)]
    assert all(len(tokens) == num_tokens for tokens in truth)
    del alone
    block_bytes = CacheConfig().block_size * checkpoint.config.kv_bytes_per_token(2 if device == "cuda" else 4)
    options = WorldOptions(
        case=case,
        num_layers=num_layers,
        device=device,
        exchange=ExchangeConfig(backend=backend, timeout_base_s=30.0, timeout_per_row_s=0.0),
        scheduler=scheduler,
        kv_memory_bytes=60 * block_bytes,
        batch_invariant=True,
        enable_prefix_cache=True,
        mesh_type=mesh,
    )
    place = uniform_place(num_layers, num_experts, num_experts * is_colocated)
    with MemberWorld(options, num_attention=num_attention, num_expert=num_expert, place=place) as world:
        for rank, role in enumerate(roles):
            world.start(f"rank{rank}", role, rank % max(NUM_GPUS, 1))
        world.wait_for_epoch([f"rank{rank}" for rank in range(len(roles))])
        for turn in range(2):
            streams = [
                world.submit(f"rank{rank}", requests_of(f"{turn}-{rank}", vocab_size, num_tokens))
                for rank, role in enumerate(roles)
                if role != "expert"
            ]
            world.wait([stream for mine in streams for stream in mine])
            for mine in streams:
                assert [stream.token_ids for stream in mine] == truth
                assert any(stream.num_cached_tokens for stream in mine) or turn == 0
        assert world.ask("rank0", "preemptions") > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_do_not_depend_on_the_layout(tmp_path, layout, backend):
    check_layout(tmp_path, layout, backend=backend)
