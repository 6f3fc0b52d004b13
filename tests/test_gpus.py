"""GPUs: how many a cluster takes, who decides on `auto`; a start that cannot have them ends before anything runs."""

from pathlib import Path

import pytest
import ray
import torch

from expertmesh.cluster.app import Cluster, actor_options
from expertmesh.cluster.gpus import (
    NCCL_ENVIRONMENT,
    check_gpus,
    gpus_needed,
    missing_gpus,
    process_environment,
    with_device,
)
from expertmesh.config import ClusterConfig
from expertmesh.errors import ConfigError, KernelError
from expertmesh.experts.worker import compute_device

SPLIT = ClusterConfig(model="m", num_attention_replicas=2, num_expert_shards=3, device="cuda")
ALONE = ClusterConfig(model="m", layout="colocated", num_attention_replicas=1, num_expert_shards=8, device="cuda")


def test_every_process_of_a_tier_takes_one_and_a_rank_that_owns_both_is_one():
    assert gpus_needed(SPLIT, 128) == {"attention": 2, "expert": 3}
    assert gpus_needed(SPLIT, 0) == {"attention": 2}, "a dense model has no expert tier"
    assert gpus_needed(ALONE, 128) == {"attention": 1}
    for role in ("attention", "expert"):
        assert actor_options(SPLIT, role)["num_gpus"] == 1
    assert actor_options(SPLIT, "gateway")["num_gpus"] == 0


@pytest.mark.parametrize(("num_gpus", "device"), [(0, "cpu"), (4, "cpu"), (5, "cuda"), (8, "cuda")])
def test_auto_is_cuda_where_every_process_can_have_one(num_gpus: int, device: str):
    undecided = ClusterConfig(model="m", num_attention_replicas=2, num_expert_shards=3)
    assert with_device(undecided, 128, num_gpus).device == device
    assert with_device(SPLIT, 128, 0) is SPLIT, "what was said is not decided anew"


def test_too_few_are_named_with_the_arithmetic():
    assert missing_gpus(SPLIT, 128, 5) == ""
    assert missing_gpus(SPLIT, 128, 4) == "5 GPUs (2 attention replicas, 3 expert shards, one each), 4 there"
    assert missing_gpus(ALONE, 128, 0) == "1 GPUs (1 colocated rank, one each), 0 there"
    assert missing_gpus(ClusterConfig(model="m", device="cpu"), 128, 0) == ""
    check_gpus(ALONE, 128, 1)
    with pytest.raises(ConfigError, match=r"device: got 'cuda', expected 5 GPUs .* 4 there; layout=colocated"):
        check_gpus(SPLIT, 128, 4)
    with pytest.raises(ConfigError, match=r"1 GPUs .* 0 there; no CUDA driver or device was found"):
        check_gpus(ALONE, 128, 0)


def test_processes_with_a_gpu_start_with_what_nccl_reads_and_the_operator_wins():
    assert process_environment({}) == NCCL_ENVIRONMENT
    assert process_environment({"TORCH_NCCL_ENABLE_MONITORING": "1"})["TORCH_NCCL_ENABLE_MONITORING"] == "1"
    assert set(actor_options(ALONE, "attention")["runtime_env"]["env_vars"]) == set(NCCL_ENVIRONMENT)
    assert "runtime_env" not in actor_options(ALONE, "gateway")
    assert "runtime_env" not in actor_options(ClusterConfig(model="m", device="cpu"), "attention")


@pytest.mark.parametrize(("there", "wanted"), [(0, 1), (1, 2)])
def test_a_local_start_that_lacks_gpus_ends_before_ray(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, there: int, wanted: int
):
    started: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests of this process share one
    monkeypatch.setattr("expertmesh.cluster.app.start_ray", started.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    config = ClusterConfig(model=str(tiny_checkpoint), layout="colocated", num_attention_replicas=wanted, device="cuda")
    cluster = Cluster(config)
    with pytest.raises(ConfigError, match=rf"{wanted} colocated ranks?, one each\), {there} there"):
        cluster.start()
    assert not started
    assert cluster.conductor is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU")
def test_a_process_whose_torch_sees_no_gpu_says_so():
    with pytest.raises(KernelError, match=r"sees no GPU in this process .* or say device=cpu"):
        compute_device(ALONE)
