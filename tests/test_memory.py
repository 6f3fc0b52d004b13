"""A shard's memory grows by its own experts, not by what the files hold."""

from expertmesh.bench.memory import LIMIT, measure


def test_resident_growth_of_loading_is_bounded_by_own_experts():
    figures = measure(expert_bytes=400 * 10**6)
    assert figures["expert_bytes"] >= 400 * 10**6
    assert len(figures["shards"]) == 4
    assert figures["worst_ratio"] <= LIMIT
