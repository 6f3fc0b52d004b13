"""What the kernels' bench reports: goals, broken musts, tables; on made-up figures, without a GPU."""

import dataclasses

import pytest

from expertmesh.kernels.bench_report import Cell, broken_musts, cell_line, goal_of, markdown, missed_goals

H100 = "NVIDIA H100 80GB HBM3"
CELL = Cell(
    model="235b",
    form="bf16",
    num_local=16,
    routing="uniform",
    num_tokens=32,
    num_pairs=39.0,
    floor_us=100.0,
    us=109.0,
    gbps=2900.0,
    tflops=12.0,
    errors={"float64": (3e-3, 1e-2)},
)


def cell(**changes) -> Cell:
    return dataclasses.replace(CELL, **changes)


@pytest.mark.parametrize(
    ("changes", "device", "goal"),
    [
        ({}, H100, 1.10),
        ({"num_tokens": 512}, H100, 1.10),  # as at 128
        ({"num_tokens": 64}, H100, None),
        ({"routing": "zipf"}, H100, None),
        ({"model": "30b"}, H100, None),
        ({"num_local": 64, "form": "fp8"}, H100, None),
        ({"num_local": 64, "form": "fp8"}, "NVIDIA H200", 1.15),
        ({"form": "int4", "model": "480b", "num_tokens": 64}, H100, 1.4),
        ({"form": "int4", "num_tokens": 128}, H100, None),
    ],
)
def test_goals_hold_for_the_cells_that_name_them(changes, device, goal):
    assert goal_of(cell(**changes), device) == goal


def test_a_cell_over_its_goal_is_missed_and_one_at_it_is_not():
    assert missed_goals([cell(us=110.4)], H100) == []
    assert missed_goals([cell(us=111.0)], H100) == ["235b bf16 16 local T 32: 1.11 x floor, goal 1.10"]


def test_int4_must_be_faster_than_fp8_of_the_same_cell():
    int4, fp8 = cell(form="int4", us=120.0), cell(form="fp8", us=115.0)
    assert missed_goals([int4, fp8], H100) == ["235b int4 16 local T 32: 120.0 us, fp8 takes 115.0"]
    assert missed_goals([int4, dataclasses.replace(fp8, num_local=128, us=90.0)], H100) == []


@pytest.mark.parametrize("error", [1.1e-2, float("nan"), float("inf")])
def test_an_error_above_its_bound_breaks_a_must(error):
    assert broken_musts([cell()]) == []
    assert len(broken_musts([cell(errors={"same rows": (3e-3, 1e-2), "others": (error, 1e-2)})])) == 1


def test_three_percent_behind_the_best_whole_layer_peer_breaks_a_must():
    assert broken_musts([cell(layer_peers={"slow": 300.0, "best": 106.0})]) == []
    assert broken_musts([cell(layer_peers={"slow": 300.0, "best": 105.0})]) == [
        "235b bf16 16 local T 32: 109.0 us, best takes 105.0"
    ]
    assert broken_musts([cell(gemm_peers={"products alone": 50.0})]) == []  # less work: shown, not compared


def test_a_line_and_a_table_say_where_there_is_no_peer():
    alone = cell(operations={"route": (2.0, 30.0), "grouped_gemm": (90.0, None)}, gemms_us=90.0)
    line = cell_line(alone)
    assert "whole-layer peers: no peer" in line
    assert "route 2.0 (30.0), grouped_gemm 90.0 (no peer)" in line
    other = cell(num_tokens=1, us=40.0, floor_us=20.0, layer_peers={"vllm": 50.0}, gemm_peers={"torch": 45.0})
    assert markdown([alone, other], H100).splitlines()[2:9] == [
        "| form, local experts | T = 1 | 32 |",
        "|---|---|---|",
        "| **bf16, 16** | **40.0** (2.00) | **109.0** (1.09) |",
        "| best whole-layer peer | 50.0 vllm | no peer |",
        "| goal | 1.60 | 1.10 |",
        "| products alone |  | 90.0 |",
        "| best products-only peer | 45.0 torch | no peer |",
    ]
