"""Configuration: sources in order, unknown names and wrong values are named errors."""

import pytest

from expertmesh.config import CacheConfig, ClusterConfig, environment_overrides, from_mapping, override
from expertmesh.errors import ConfigError


def test_round_trip_through_json():
    config = ClusterConfig(model="m", layout="colocated", cache=CacheConfig(block_size=32))
    assert ClusterConfig.from_json(config.to_json()) == config


def test_environment_and_flags_convert_to_the_fields_type():
    assignments = environment_overrides({"EXPERTMESH_SCHEDULER__MAX_NUM_SEQS": "8", "OTHER": "x"})
    config = override(ClusterConfig(), assignments | {"batch_invariant": "off", "session_ttl_s": "5"})
    assert (config.scheduler.max_num_seqs, config.batch_invariant, config.session_ttl_s) == (8, False, 5.0)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"modle": "x"}, "modle"),
        ({"layout": "diagonal"}, "layout"),
        ({"num_expert_shards": 0}, "num_expert_shards"),
        ({"cache": {"block_size": 12}}, "cache.block_size"),
        ({"scheduler": {"max_num_seqs": "many"}}, "scheduler.max_num_seqs"),
        ({"network": {"gateway_port": 70000}}, "network.gateway_port"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_field(values, field):
    with pytest.raises(ConfigError) as caught:
        from_mapping(ClusterConfig, values)
    assert caught.value.field == field


@pytest.mark.parametrize("path", ["nothing", "cache.nothing", "nothing.else"])
def test_an_unknown_override_is_an_error(path):
    with pytest.raises(ConfigError):
        override(ClusterConfig(), {path: "1"})
