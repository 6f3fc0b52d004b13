"""Plans without a GPU: bytes as the released models have them, floors as measured elsewhere, and honest refusals."""

import json
from dataclasses import replace

import pytest

from expertmesh import cli
from expertmesh.cluster.sizing import (
    GIB,
    GPUS,
    NUM_SPARE,
    Workload,
    attention_parameters,
    distinct_experts,
    exchange_bytes_per_token,
    expert_bytes,
    form_of,
    has_zero_points,
    make_plan,
    parse_gpu,
    plans,
    step_floor,
    what_would_fit,
    widened_kv_bytes,
)
from expertmesh.errors import ConfigError
from expertmesh.model_config import ModelConfig

H100, H200 = GPUS["H100"], GPUS["H200"]
RAW = {
    "30b": {
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
    },
    "235b": {
        "num_hidden_layers": 94,
        "hidden_size": 4096,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "num_experts": 128,
    },
    "480b": {
        "num_hidden_layers": 62,
        "hidden_size": 6144,
        "moe_intermediate_size": 2560,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "num_experts": 160,
    },
    "32b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 64,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
SHARED = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 40960,
}
MODELS = {name: ModelConfig.from_mapping(SHARED | raw) for name, raw in RAW.items()}


@pytest.mark.parametrize(("name", "total_gb"), [("30b", 61.06), ("235b", 470.19), ("480b", 960.31), ("32b", 65.52)])
def test_bf16_bytes_are_those_of_the_released_model(name, total_gb):
    config = MODELS[name]
    experts = config.num_experts * len(config.moe_layer_ids) * expert_bytes(config, "bf16") if config.num_experts else 0
    assert (2 * attention_parameters(config) + experts) / 1e9 == pytest.approx(total_gb, abs=0.02)


@pytest.mark.parametrize(("form", "gb"), [("bf16", 454.2), ("fp8", 227.2), ("int4", 117.1)])
def test_experts_of_235b_in_each_form_of_the_kernels(form, gb):
    assert 128 * 94 * expert_bytes(MODELS["235b"], form) / 1e9 == pytest.approx(gb, abs=0.05)
    assert expert_bytes(MODELS["235b"], "int4", zero_points=True) > expert_bytes(MODELS["235b"], "int4")


def test_the_packed_bytes_are_what_the_kernels_store():
    import torch

    from expertmesh.kernels.pack import pack_experts
    from expertmesh.kernels.pack_int4 import random_int4
    from expertmesh.kernels.pack_mma import pack_mma

    config = replace(MODELS["30b"], hidden_size=512, moe_intermediate_size=256)
    w13, w2 = torch.zeros(1, 512, 512, dtype=torch.bfloat16), torch.zeros(1, 512, 256, dtype=torch.bfloat16)

    def stored(packed):
        tensors = [packed.w13, packed.w2, getattr(packed, "w13_scales", None), getattr(packed, "w2_scales", None)]
        return sum(t.nbytes for t in tensors if t is not None)

    assert stored(pack_experts(w13, w2)) == expert_bytes(config, "bf16")
    fp8 = [t.to(torch.float8_e4m3fn) for t in (w13, w2)]
    assert stored(pack_experts(*fp8, torch.ones(1, 4, 4), torch.ones(1, 4, 2))) == expert_bytes(config, "fp8")
    for zeros in (False, True):
        int4 = pack_mma(*random_int4(1, 512, 256, zeros=zeros))
        assert stored(int4) == expert_bytes(config, "int4", zero_points=zeros)


def test_spare_places_are_those_that_a_shard_has():
    from expertmesh.experts import device_experts

    assert device_experts.NUM_SPARE == NUM_SPARE


@pytest.mark.parametrize(("batch", "ms"), [(1, 1.96), (8, 8.33), (32, 17.2), (128, 20.1), (256, 20.9)])
def test_floors_of_30b_on_an_h100_are_those_that_others_are_compared_with(batch, ms):
    assert step_floor(MODELS["30b"], H100, batch=batch, context=192).ms == pytest.approx(ms, rel=0.005)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 8), (8, 51.6), (32, 111.8), (128, 128)])
def test_even_routing_touches_so_many_experts(tokens, experts):
    assert distinct_experts(MODELS["235b"], tokens) == pytest.approx(experts, abs=0.1)


def test_counted_experts_replace_the_expectation():
    few = step_floor(MODELS["30b"], H100, batch=32, context=192, distinct=50.0)
    assert few.distinct_experts == 50.0
    assert few.ms < 0.6 * step_floor(MODELS["30b"], H100, batch=32, context=192).ms


def test_one_h100_holds_30b_and_says_how_much_kv_is_left():
    (plan,) = plans(MODELS["30b"], H100, 1)
    assert plan.fits
    assert plan.layout == "colocated"
    assert plan.slots_per_rank == 128
    assert plan.num_redundant == 0
    held = plan.attention_weight_bytes + plan.expert_weight_bytes + plan.reserved_bytes + plan.kv_bytes
    assert held == H100.usable_bytes
    assert plan.kv_tokens == plan.kv_bytes // 98304
    assert plan.return_bytes_per_token == 0  # nothing leaves the GPU


def test_two_tiers_trade_kv_for_redundancy():
    found = {p.num_attention: p for p in plans(MODELS["235b"], H100, 8, layout="disaggregated", form="fp8") if p.fits}
    assert sorted(found) == [1, 2, 3, 4, 5]
    kv = [a * p.kv_tokens for a, p in sorted(found.items())]
    redundant = [p.num_redundant for _, p in sorted(found.items())]
    assert kv == sorted(kv)
    assert redundant == sorted(redundant, reverse=True)
    for p in found.values():
        assert p.num_shards * p.slots_per_rank >= 128


def test_the_best_split_comes_first_and_impossible_ones_last():
    found = plans(MODELS["235b"], H100, 8, form="fp8")
    assert [p.fits for p in found] == sorted((p.fits for p in found), reverse=True)
    fitting = [sum(f.ms for f in p.floors if f.context == 192) for p in found if p.fits]
    assert fitting == sorted(fitting)


def test_what_does_not_fit_says_by_how_much_and_what_would():
    found = plans(MODELS["235b"], H100, 4)
    assert not any(p.fits for p in found)
    assert "on each of 4 GPUs" in found[0].problems[0]
    ways = what_would_fit(MODELS["235b"], H100, layout=None, form="bf16")
    assert "4 x H100 80 GiB with fp8 experts" in ways
    assert "1 x H200 141 GiB with int4 experts" in ways
    for way in ways:  # each is true, and one GPU less is not
        num, _, name, _, _, _, form, _ = way.split()
        assert plans(MODELS["235b"], GPUS[name], int(num), form=form)[0].fits
        if int(num) > 1:
            assert not plans(MODELS["235b"], GPUS[name], int(num) - 1, form=form)[0].fits


def test_a_context_that_no_replica_holds_is_a_problem():
    workload = Workload(context=1_000_000)
    (plan,) = plans(MODELS["32b"], H100, 1, workload=workload)
    assert "one sequence of 1,000,000 needs 262.1 GB" in plan.problems[0]


def test_fp8_kv_holds_twice_the_tokens(tmp_path, capsys):
    plans = {
        bytes_: make_plan(
            MODELS["30b"],
            H100,
            layout="colocated",
            num_attention=1,
            num_shards=1,
            workload=Workload(kv_element_bytes=bytes_),
        )
        for bytes_ in (1, 2)
    }
    widened = plans[1].reserved_bytes - plans[2].reserved_bytes
    assert widened == widened_kv_bytes(MODELS["30b"], 32768) == 65536 * 512 * 4
    assert plans[1].kv_bytes + widened == plans[2].kv_bytes
    assert plans[1].kv_tokens == pytest.approx(2 * plans[2].kv_tokens, rel=0.02)
    assert plans[1].floors[-1].ms < plans[2].floors[-1].ms
    (tmp_path / "config.json").write_text(json.dumps(SHARED | RAW["30b"]))
    assert cli.main(["plan", str(tmp_path), "--kv-dtype", "fp8"]) == 0
    assert f"= {plans[1].kv_tokens:,} tokens in fp8" in capsys.readouterr().out


def test_a_row_goes_once_to_each_gpu_and_comes_back_for_each_expert():
    config = MODELS["235b"]
    row = 2 * 4096 * 94
    assert exchange_bytes_per_token(config, 1, colocated=True) == (0, 0)
    there, back = exchange_bytes_per_token(config, 1, colocated=False)
    assert (there, back) == (row, 8 * row)
    there, back = exchange_bytes_per_token(config, 2, colocated=True)
    assert row * 0.99 < there < row
    assert back == 4 * row
    there, _ = exchange_bytes_per_token(config, 128, colocated=False)
    assert there == pytest.approx(8 * row, rel=1e-6)


def test_a_dense_model_has_replicas_and_no_shards():
    (plan,) = plans(MODELS["32b"], H200, 2)
    assert plan.fits
    assert (plan.num_attention, plan.num_shards, plan.expert_weight_bytes) == (2, 0, 0)
    assert plan.floors[0].distinct_experts == 0


@pytest.mark.parametrize(
    ("quantization", "form", "zeros"),
    [
        (None, "bf16", False),
        ({"quant_method": "fp8"}, "fp8", False),
        ({"quant_method": "gptq", "sym": True}, "int4", False),
        ({"quant_method": "awq", "zero_point": True}, "int4", True),
    ],
)
def test_the_form_is_read_from_config_json(quantization, form, zeros):
    raw = {"quantization_config": quantization}
    assert form_of(raw) == form
    assert has_zero_points(raw) is zeros


def test_gpus_by_name_and_by_figures():
    assert parse_gpu("h200") == H200
    assert parse_gpu("H100:96").memory_bytes == 96 * GIB
    other = parse_gpu("B200:180:7000:1600")
    assert (other.name, other.read_bytes_per_s, other.fp8_flops) == ("B200", 7000e9, 1600e12)
    for wrong in ("B200", "B200:180", "H100:x", "H100:-1", "H100:80:1"):
        with pytest.raises(ConfigError, match="--gpu"):
            parse_gpu(wrong)


def test_more_attention_replicas_share_the_sequences():
    shared = {"config": MODELS["235b"], "gpu": H100, "layout": "disaggregated", "num_shards": 4, "form": "fp8"}
    one, two = (make_plan(num_attention=n, **shared) for n in (1, 2))
    assert two.max_sequences == 2 * one.max_sequences
    assert two.floors[-1].ms < one.floors[-1].ms


@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--quant", "bf16"], 1)])
def test_the_command_prints_the_plan_and_exits_by_whether_it_fits(tmp_path, capsys, flags, code):
    raw = SHARED | RAW["235b"] | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    arguments = ["plan", str(tmp_path), "--gpu", "H200:141", "-n", "2", *flags]
    assert cli.main(arguments) == code
    text = capsys.readouterr().out
    assert ("does not fit" in text.splitlines()[1]) == bool(code)
    assert ("would fit: 4 x H200 141 GiB with bf16 experts" in text) == bool(code)
    assert ("floor of a decode step" in text) != bool(code)
    assert cli.main([*arguments, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["plans"][0]["fits"] is not bool(code)
    assert found["plans"][0]["gpu"]["name"] == "H200"


def test_a_wrong_split_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SHARED | RAW["30b"]))
    assert cli.main(["plan", str(tmp_path), "-n", "2", "--attention", "2"]) == 2
    assert "--attention" in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path), "-n", "1", "--layout", "disaggregated"]) == 2
    assert "two tiers take two" in capsys.readouterr().err
