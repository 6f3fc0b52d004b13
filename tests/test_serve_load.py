"""The load generator: what it asks, what it makes of what came, and both through a real gateway with a fake engine."""

import asyncio
import itertools

import pytest
from gateway_world import gateway, say

from expertmesh.bench import serve
from expertmesh.bench.chart import Chart
from expertmesh.bench.serve_against import Engine, beside
from expertmesh.bench.serve_clients import play, request_of
from expertmesh.bench.serve_figures import Objective, Record, decode_rate, figures, panels, percentile, wrong
from expertmesh.bench.serve_mixes import CLOSING_TOKENS, Ask, fixed, poisson, shared_out, thinking, turns
from expertmesh.config import ClusterConfig
from expertmesh.proto import expertmesh_pb2 as pb

WORDS = say("<think>\n" + "so " * 20 + "</think>\n\n" + "word " * 200)


def test_a_load_is_its_seeds_and_no_two_prompts_share_a_prefix():
    mix = fixed(4, 16, 8, rounds=3, vocab=1000, seed=5)
    assert mix == fixed(4, 16, 8, rounds=3, vocab=1000, seed=5) != fixed(4, 16, 8, rounds=3, vocab=1000, seed=6)
    prompts = [ask.token_ids for script in mix.scripts for ask in script.asks]
    assert len(prompts) == mix.num_asks == 12
    assert len({prompt[:4] for prompt in prompts}) == 12
    assert {len(p) for p in prompts} == {16}
    assert max(map(max, prompts)) < 1000


def test_an_open_loop_arrives_at_its_rate_and_waits_for_nobody():
    mix = poisson(10.0, 2000, 64, 32, vocab=1000, seed=1)
    starts = [script.start_s for script in mix.scripts]
    assert starts == sorted(starts)
    assert starts[-1] == pytest.approx(200.0, rel=0.1)
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    mean = sum(gaps) / len(gaps)
    assert sum((g - mean) ** 2 for g in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.2), "exponential gaps"
    assert all(len(script.asks) == 1 for script in mix.scripts)
    assert {32 <= len(s.asks[0].token_ids) <= 96 and 16 <= s.asks[0].max_tokens <= 48 for s in mix.scripts} == {True}


def test_thinking_leaves_room_for_the_answer_and_turns_are_conversations():
    (ask,) = thinking(1, 100, 30).scripts[0].asks
    assert (ask.thinking, ask.thinking_budget, ask.max_tokens) == (True, 100, 100 + CLOSING_TOKENS + 30)
    sent = pb.GenerateRequest.FromString(request_of(ask))
    assert sent.thinking.mode == pb.ThinkingOptions.ON
    assert sent.thinking.budget_tokens == 100
    (opened,) = thinking(1, 100, 30, opened=True).scripts[0].asks
    sent = pb.GenerateRequest.FromString(request_of(opened))
    assert sent.prompt.endswith("assistant\n<think>\n")
    assert (sent.HasField("chat"), sent.thinking.budget_tokens) == (False, 100)
    mix = turns(3, 4, 16)
    assert len({script.session_id for script in mix.scripts}) == 3
    assert all(len(script.asks) == 4 for script in mix.scripts)
    assert pb.GenerateRequest.FromString(request_of(Ask(1, text="x"), "s")).thinking.mode == pb.ThinkingOptions.OFF


def test_scripts_are_dealt_to_all_processes_and_none_is_lost():
    mix = fixed(7, 1, 1, vocab=10)
    parts = shared_out(mix, 3)
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted(number for part in parts for number, _ in part) == list(range(7))
    assert len(shared_out(mix, 100)) == 7, "no process without work"


def record(number: int, due_s: float, times: list[float], *, thinking_until: int = 0, turn: int = 0) -> Record:
    arrivals = [(at, 1, i < thinking_until) for i, at in enumerate(times)]
    count = len(times)
    return Record(number, turn, due_s, due_s + 0.001, arrivals, times[-1], count, 10, 5, count)


def test_figures_are_those_of_a_run_worked_out_by_hand():
    records = [
        record(0, 100.0, [100.1, 100.2, 100.3, 100.4], thinking_until=2),
        record(1, 100.0, [100.2, 100.4, 100.6, 100.8]),
        record(1, 101.0, [101.05, 101.15], turn=1),
    ]
    failed = Record(2, 0, 100.0, 100.0, [], error="UNAVAILABLE: gone")
    found = figures([*records, failed], 100.0, Objective(ttft_s=0.15, tpot_s=0.15))
    assert (found.requests, found.failed, found.tokens, found.wall_s) == (4, 1, 10, 1.15)
    assert found.tokens_per_s == pytest.approx(10 / 1.15, abs=0.1)
    assert (found.ttft_ms_p50, found.ttft_ms_p99) == (100.0, 200.0)
    assert (found.first_answer_ms_p50, found.first_answer_ms_p99) == (200.0, 300.0)
    assert (found.itl_ms_p50, found.itl_ms_max) == (100.0, 200.0)
    assert found.slo_kept == 0.5, "the second is too slow, the failed one missed it too"
    assert found.goodput_per_s == pytest.approx(2 / 1.15, abs=1e-3)
    assert (found.later_turns_ttft_ms_p50, found.cached_share_of_later_prompts) == (50.0, 0.5)
    assert found.client_lag_ms_p50 == 1.0
    with pytest.raises(ValueError, match="none of 1 requests got a token: UNAVAILABLE"):
        figures([failed], 100.0, Objective())


def test_decode_rate_counts_only_while_all_streams_run():
    together = [record(i, 0.0, [1.0 + i, 2.0, 3.0, 4.0]) for i in range(2)]
    assert decode_rate(together) == pytest.approx(2.0), "from 2.0 (the last first token) to 4.0: two streams a second"
    assert decode_rate([record(0, 0.0, [1.0, 2.0]), record(1, 0.0, [3.0, 4.0])]) is None, "never both"
    later = record(1, 0.5, [2.0, 3.0, 4.0, 5.0])
    assert decode_rate([together[0], later]) is None, "an open loop has no such time"


def test_what_must_not_be_is_named():
    short = record(0, 0.0, [1.0, 2.0])
    short.max_tokens = 3
    assert wrong([record(1, 0.0, [1.0])]) == []
    assert wrong([short, Record(4, 1, 0.0, error="CANCELLED: x")]) == [
        "script 0, turn 0: 2 tokens came, 2 counted, 3 asked",
        "script 4, turn 1: CANCELLED: x",
    ]


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 2), (0.51, 3), (0.75, 3), (0.99, 4), (1.0, 4)])
def test_percentiles_are_values_that_occurred(share: float, value: int):
    assert percentile([4, 2, 1, 3], share) == value


def test_what_a_cluster_costs_beside_its_engine_alone():
    report = {
        "decode": [{"batch": 128, "tokens_per_s": 5000.0}],
        "prefill": [{"num_prompts": 1, "prompt_tokens": 64, "ms": 10.0}],
    }
    engine = Engine.of(report)
    row = {"mix": "fixed", "streams": 128, "prompt_tokens": 64, "decode_tokens_per_s": 4800.0, "ttft_ms_p50": 100.0}
    assert beside(row, engine) == {"engine_tokens_per_s": 5000.0, "share_of_engine": 0.96, "share_met": True}
    one = {**row, "streams": 1, "ttft_ms_p50": 16.0}
    assert beside(one, engine) == {"engine_ttft_ms": 10.0, "ttft_overhead_ms": 6.0, "ttft_met": False}
    assert beside({**row, "mix": "turns"}, engine) == {}


async def test_a_closed_loop_through_a_gateway_from_two_processes():
    async with gateway(WORDS) as world:
        mix = fixed(6, 5, 40, rounds=2, vocab=150_000)
        begun_s, records = await asyncio.to_thread(play, mix, [world.server.address], 2)
    assert wrong(records) == []
    assert [(r.script, r.turn) for r in records] == [(s, t) for s in range(6) for t in range(2)]
    found = figures(records, begun_s, Objective(60.0, 60.0))
    assert (found.tokens, found.requests, found.slo_kept) == (480, 12, 1.0)
    assert all(r.due_s >= begun_s and r.sent_s >= r.due_s for r in records)
    assert all(r.prompt_tokens == 5 for r in records)
    chart = Chart("load", panels(records, begun_s, "fixed")).svg()
    assert chart.count("<path") >= 4
    assert "tokens/s" in chart


async def test_thinking_is_told_from_the_answer_and_an_open_loop_keeps_its_times():
    async with gateway(WORDS) as world:
        mix = thinking(2, 0, 60)
        _, records = await asyncio.to_thread(play, mix, [world.server.address], 1)
        assert [r.error for r in records] == ["", ""]
        assert all(r.arrivals[0][2] and not r.arrivals[-1][2] for r in records)
        assert all(r.first_answer_s is not None and r.first_answer_s >= r.ttft_s for r in records)
        budgeted = thinking(2, 10, 30, opened=True)
        _, records = await asyncio.to_thread(play, budgeted, [world.server.address], 1)
        assert wrong(records) == []
        assert {r.thinking.budget_tokens for r in world.engine.submitted[-2:]} == {10}
        opened = poisson(50.0, 10, 4, 8, vocab=1000)
        begun_s, records = await asyncio.to_thread(play, opened, [world.server.address], 3)
    assert wrong(records) == []
    assert [r.due_s - begun_s for r in records] == pytest.approx([s.start_s for s in opened.scripts])


async def test_a_gateway_that_refuses_is_a_fault_with_its_status():
    async with gateway(WORDS) as world:
        begun_s, records = await asyncio.to_thread(play, fixed(1, 600, 8, vocab=9), [world.server.address], 1)
    assert len(records) == 1
    assert records[0].error.startswith("INVALID_ARGUMENT: ")
    assert wrong(records) == [f"script 0, turn 0: {records[0].error}"]
    with pytest.raises(ValueError, match="none of 1 requests got a token"):
        figures(records, begun_s, Objective())


async def test_the_command_line_runs_every_mix_and_reports_it(capsys: pytest.CaptureFixture[str], tmp_path):
    chart = tmp_path / "load.svg"
    async with gateway(WORDS) as world:
        argv = ["--address", world.server.address, "--mix", "fixed", "poisson", "--streams", "2", "--rate", "40"]
        argv += [
            "--requests",
            "4",
            "--prompt-tokens",
            "4",
            "--output-tokens",
            "6",
            "--clients",
            "1",
            "--svg",
            str(chart),
        ]
        assert await asyncio.to_thread(serve.main, argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert '"bench": "serve"' in lines[-1]
    assert '"mix": "poisson", "rate": 40.0' in lines[1]
    assert chart.read_text().count("tokens/s") == 2


def test_settings_of_the_cluster_that_is_started_come_from_the_command_line():
    arguments = serve.parser().parse_args(["--model", "m", "--set", "device=cpu", "--set", "layout=colocated"])
    assert serve.config_of(arguments) == ClusterConfig(
        model="m", device="cpu", layout="colocated", network=serve.config_of(arguments).network
    )
    assert serve.config_of(arguments).network.gateway_port == 0
