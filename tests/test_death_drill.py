"""The death drill with real engines, agents and membership on CPUs: a member is killed while streams run, and no token
is another one. Here the steps are those of GPU members (`DeviceStep`, the NCCL exchange's forms over gloo); with GPUs:
`make death-drill`."""

import mesh_worlds
import pytest

from expertmesh.bench.death_drill import Drill, make_parser

TINY = ["--case", "tiny", "--layers", "2", "--streams", "2", "--tokens", "40", "--device", "cpu", "--kv-mib", "64"]


@pytest.mark.parametrize("layout", ["colocated", "disaggregated"])
def test_streams_outlive_a_killed_member_token_by_token(layout):
    drill = Drill(make_parser().parse_args(TINY), mesh_type=mesh_worlds.DeviceStepsOverGloo)
    result = getattr(drill, layout)()
    assert drill.wrong == []
    assert result["identical"]
    assert result["epoch"] == 2
    assert result.get("drained", True)
