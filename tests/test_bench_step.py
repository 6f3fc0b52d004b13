"""The engine's benchmark on a CPU: it measures what it says, and fails where an answer is not what it must be."""

import json

import mesh_worlds
import pytest
import torch

from expertmesh.bench import step, step_pair
from expertmesh.bench.member_world import Watched
from expertmesh.bench.profile import (
    KernelRun,
    ProfileError,
    group_of,
    last_steps,
    set_floors,
    split_runs,
    summarise,
    table,
)
from expertmesh.bench.step_cases import CASES, open_case
from expertmesh.cluster.sizing import GPUS
from expertmesh.model_config import ModelConfig

TINY = ["--case", "tiny", "--device", "cpu", "--batched-tokens", "256", "--prompt", "8", "--output", "6"]

PAIR = ["--case", "tiny", "--layers", "2", "--device", "cpu", "--backends", "auto", "--prompt", "8", "--output", "6"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_a_tiny_model_is_measured_and_the_last_line_is_json(capsys):
    assert step.main([*TINY, "--batches", "1,3", "--prefill", "2x16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert [d["batch"] for d in found["decode"]] == [1, 3]
    for decode in found["decode"]:
        assert decode["ms"] > 0
        assert decode["num_steps"] == 2 * 5  # two runs of 6 tokens: 5 gaps each
        assert decode["floor_ms"] is None
    assert found["decode"][0]["distinct_experts"] == 4  # one token's top-4
    assert 4 < found["decode"][1]["distinct_experts"] <= 12
    assert found["prefill"][0]["tokens_per_s"] > 0
    assert {"device", "weights", "kv", "experts", "first tokens"} <= set(found["phases"])
    assert found["ready_s"] >= sum(found["phases"].values())
    assert any("experts a layer" in line for line in lines)


def test_a_wrong_answer_breaks_the_run(capsys, monkeypatch):
    def decode(self, batch):
        (stream,) = self.generate(batch, prompt=8, output=3)
        stream.token_ids.pop()
        self._checked(stream, 3)

    monkeypatch.setattr(step.StepBench, "decode", decode)
    assert step.main([*TINY, "--batches", "1", "--prefill", ""]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "2 of 3 tokens, LENGTH" in found["broken"]


def test_only_steps_that_gave_everybody_a_token_count():
    times = [[1.0, 2.0, 3.5, 4.0], [2.0, 3.5, 3.7, 4.0, 4.5]]
    assert step.step_gaps(times) == [1.5]  # from 2.0 to 3.5; another step came between 3.5 and 4.0
    assert step.step_gaps([[1.0, 1.25, 1.75]]) == [0.25, 0.5]


@pytest.mark.parametrize("name", [name for name in CASES if name != "tiny"])
def test_every_case_is_a_model_that_loads_from_its_config_alone(name, tmp_path):
    checkpoint = open_case(name, tmp_path, num_layers=2)
    assert checkpoint.config.num_layers == 2
    last = (
        "model.layers.1.mlp.experts.127.down_proj" if checkpoint.config.num_experts else "model.layers.1.mlp.down_proj"
    )
    assert any(entry.startswith(last) for entry in checkpoint.names)


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("grouped_gemm", "experts"),
        ("grouped_gemm_mma", "experts"),
        ("void flashinfer::BatchPrefillWithPagedKVCacheKernel<...>", "attention"),
        ("merge_chunks(...)", "attention"),
        ("route_and_pack", "route, pack, combine"),
        ("combine_add_rms_norm", "route, pack, combine"),
        ("add_rms_norm", "norm, rope"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "dense"),
        ("void cublasLt::splitKreduce_kernel<...>", "dense"),
        ("thin_linear", "dense"),
        ("dense_fp8", "dense"),
        ("quantize_rows", "dense"),
        ("sample_choose", "sampling"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::index_elementwise_kernel", "other"),
    ],
)
def test_kernels_are_known_by_their_names(kernel, group):
    assert group_of(kernel) == group


def runs_of(steps, *, kernels_a_step=3):
    """Steps of 100 us: an embedding of 10 us, then products of 20 us that begin 30 us apart."""
    runs = []
    for i in range(steps):
        runs.append(KernelRun("embed_rms_norm", 100.0 * i, 10.0))
        runs += [KernelRun("grouped_gemm", 100.0 * i + 10 + 30 * j, 20.0) for j in range(kernels_a_step)]
    return runs


def test_whole_steps_are_taken_apart_and_gaps_are_what_no_kernel_fills():
    profile = summarise([KernelRun("grouped_gemm", -50.0, 10.0), *runs_of(5)], batch=4, num_layers=3)
    assert (profile.num_steps, profile.wall_us, profile.busy_us) == (4, 100.0, pytest.approx(70.0))
    assert profile.groups["experts"].us == pytest.approx(60.0)
    assert profile.groups["norm, rope"].launches == 1
    assert profile.launches_per_layer == pytest.approx(4 / 3)
    assert profile.gap_share == pytest.approx(0.3)


def test_kernels_that_run_side_by_side_are_busy_once():
    runs = [KernelRun("embed_rms_norm", 100.0 * i, 50.0) for i in range(3)]
    runs += [KernelRun("grouped_gemm", 100.0 * i + 20, 60.0) for i in range(3)]
    profile = summarise(runs, batch=1, num_layers=1)
    assert profile.busy_us == pytest.approx(80.0)
    assert sum(group.us for group in profile.groups.values()) == pytest.approx(110.0)


def test_a_profile_without_a_whole_step_says_so():
    with pytest.raises(ProfileError, match="at least two must begin"):
        summarise(runs_of(1), batch=1, num_layers=1)
    with pytest.raises(ProfileError, match="12 steps among 48 kernels, of which 10 should be taken apart"):
        last_steps(runs_of(12), 10)


def test_runs_of_one_session_are_told_apart_by_the_kernel_before_each():
    spin = "at::cuda::(anonymous namespace)::spin_kernel(long)"
    first, second = runs_of(2), [KernelRun(k.name, k.start_us + 1000, k.duration_us) for k in runs_of(4)]
    found = [KernelRun("Memset (Device)", -9.0, 1.0), *second, KernelRun(spin, 990.0, 5.0)]
    assert split_runs([*found, KernelRun(spin, -5.0, 3.0), *first], 2) == [first, second]
    with pytest.raises(ProfileError, match="saw 17 kernels and copies in 1 of 2 runs: another tool"):
        split_runs([KernelRun(spin, 990.0, 5.0), *second], 2)
    with pytest.raises(ProfileError, match="saw 0 kernels"):
        split_runs([], 1)


def test_steps_are_taken_before_those_in_which_sequences_end():
    steps = runs_of(20)
    profile = summarise(last_steps(steps, 8), batch=1, num_layers=3)
    assert (profile.num_steps, profile.wall_us) == (8, 100.0)
    assert last_steps(steps, 8)[-1].start_us == 1700.0  # the third step from the end begins there


def test_a_batch_is_watched_in_a_run_of_its_own_after_it_has_warmed_up(capsys, monkeypatch):
    def watch(runs):
        for run in runs:
            run()
        return [runs_of(20) for _ in runs]

    monkeypatch.setattr(step, "watch", watch)
    assert step.main([*TINY, "--batches", "", "--prefill", "", "--profile", "1,2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert [p["batch"] for p in found["profile"]] == [1, 2]
    assert sum("100 us a step, 30.0 % of it gaps" in line for line in lines) == 2


def test_floors_of_the_groups_add_up_to_that_of_the_step():
    config = ModelConfig.from_mapping({"model_type": "qwen3_moe", "max_position_embeddings": 4096} | CASES["30b"])
    profile = summarise(runs_of(4), batch=32, num_layers=48)
    set_floors(profile, config, GPUS["H100"], form="bf16", context=192)
    weights = sum(profile.groups[name].floor_us for name in ("experts", "attention", "dense"))
    assert weights / 1e3 == pytest.approx(17.2, rel=0.005)
    assert 0 < profile.groups["route, pack, combine"].floor_us < 0.02 * weights
    lines = table(profile)
    assert "30.0 % of it gaps" in lines[0]
    assert any(line.split()[0] == "experts" for line in lines[2:])


def test_ranks_that_share_the_experts_are_measured_as_one_batch(capsys):
    arguments = step_pair.make_parser().parse_args([*PAIR, "--batches", "1,5"])
    found = step_pair.measure(arguments, mesh_type=mesh_worlds.DeviceStepsOverGloo)
    assert found["broken"] == ""
    assert [d["batch"] for d in found["decode"]] == [1, 5]
    assert all(d["ms"] > 0 and d["num_steps"] >= 1 and d["floor_ms"] is None for d in found["decode"])
    assert [facts["device"] for facts in found["worlds"][0]["ranks"]] == ["cpu", "cpu"]
    assert "auto batch 5: " in capsys.readouterr().out


def test_an_answer_of_another_length_breaks_the_pairs_run():
    world = FakeWorld()
    bench = step_pair.PairBench(step_pair.make_parser().parse_args(PAIR), "auto", world, open_config("tiny"))
    assert bench._run(3, 6) == [world.streams[:2], world.streams[2:]]
    world.missing = 1
    with pytest.raises(step.Broken, match="5 of 6 tokens on rank0: LENGTH"):
        bench._run(1, 6)


class FakeWorld:
    """Answers at once, with `missing` tokens too few."""

    def __init__(self):
        self.missing, self.streams = 0, []

    def submit(self, name, requests):
        new = [Watched(r, name, token_ids=[1] * (r.sampling.max_tokens - self.missing), end="LENGTH") for r in requests]
        self.streams += new
        return new

    def wait(self, streams, timeout_s):
        assert streams


def open_config(case):
    return ModelConfig.from_mapping({"model_type": "qwen3_moe", "max_position_embeddings": 4096} | CASES[case])
