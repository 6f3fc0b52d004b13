"""Promise: an error of the tree crosses gRPC as its status and comes back as itself, with its facts."""

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from expertmesh import errors
from expertmesh.router.gateway.rpc_errors import from_rpc, make_error, status_code, trailing_metadata

EVERY = [
    errors.InvalidRequest("sampling.top_p", 7, "above 0, at most 1"),
    errors.NotFound("session", "s1"),
    errors.Unauthenticated("no token"),
    errors.SessionConflict("s1", expected_version=2, current_version=3),
    errors.QueueFull("full", retry_after_s=0.25),
    errors.KVCacheExhausted("full"),
    errors.NoReplica("none"),
    errors.SessionStoreUnavailable("away"),
    errors.ReplicaLost("lost"),
    errors.DeadlineExceeded("late"),
    errors.RequestCancelled("cancelled"),
    errors.EpochError("stale"),
    errors.CheckpointError("broken", file="x", tensor="y"),
    errors.StartupError("no"),
]


@pytest.mark.parametrize("error", EVERY, ids=lambda e: type(e).__name__)
def test_it_comes_back_as_itself(error):
    found = from_rpc(status_code(error), error.message, trailing_metadata(error))
    assert type(found) is type(error)
    assert (found.message, found.retry_after_s) == (error.message, error.retry_after_s)
    for name in ("field", "current_version", "kind", "session_id"):
        assert getattr(found, name, None) == getattr(error, name, None)


def test_details_name_field_and_retry_delay():
    bad = status_pb2.Status.FromString(dict(trailing_metadata(EVERY[0]))["grpc-status-details-bin"])
    violation = error_details_pb2.BadRequest()
    assert any(d.Unpack(violation) for d in bad.details)
    assert violation.field_violations[0].field == "sampling.top_p"
    assert dict(trailing_metadata(EVERY[4]))["retry-after-s"] == "0.250"


def test_a_status_of_somebody_else_is_still_an_error_of_the_tree():
    found = from_rpc(grpc.StatusCode.UNIMPLEMENTED, "what?", ())
    assert isinstance(found, errors.ExpertMeshError)
    assert (found.code, found.message) == ("UNIMPLEMENTED", "what?")
    assert isinstance(from_rpc(grpc.StatusCode.UNAVAILABLE, "x", ()), errors.Unavailable)
    assert make_error("NO_SUCH_CODE", "x").code == "INTERNAL"


def test_broken_details_do_not_hide_the_error():
    found = from_rpc(
        grpc.StatusCode.UNAVAILABLE, "x", (("grpc-status-details-bin", b"\xff\xff"), ("retry-after-s", "soon"))
    )
    assert (found.message, found.retry_after_s) == ("x", None)
