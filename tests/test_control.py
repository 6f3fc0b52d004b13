"""The leader core as readable traces (tests/traces/leader_*.txt; `EXPERTMESH_REWRITE_TRACES=1` rewrites them), and the
control channel over real sockets."""

import contextlib
import os
import queue
import socket
from pathlib import Path

import pytest

from expertmesh.errors import ReplicaLost, Unauthenticated
from expertmesh.router.control import (
    ControlServer,
    Kind,
    connect,
    decode_bid,
    decode_done,
    encode_bid,
    encode_done,
)
from expertmesh.router.epoch import Epoch, Member, StepHeader
from expertmesh.router.leader import BidPlaced, EpochInstalled, GraceOver, IssueHeader, Leader, StepDone
from expertmesh.router.placement import uniform

TRACES = Path(__file__).parent / "traces"
HOST = "127.0.0.1"


def epoch(names, number=1):
    members = tuple(Member(member_id=n, attention=n[0] in "ac", expert=n[0] in "ec") for n in names)
    num_experts = sum(m.expert for m in members)
    return Epoch(number=number, members=members, placement=uniform(1, 4, max(1, num_experts), version=number))


class Trace:
    """Times are milliseconds."""

    def __init__(self, name, **options):
        self.name, self.lines, self.last = name, [], None
        self.leader = Leader(**{"max_prefill_tokens": 100, **options})

    def say(self, event, at):
        match event:
            case BidPlaced(who, decode, prefill, after, _):
                said = f"{who} bids {decode} + {prefill}, after step {after}"
            case StepDone(who, step_id, failed):
                said = f"{who} {'failed in' if failed else 'is done with'} step {step_id}"
            case EpochInstalled(installed, last):
                said = f"epoch {installed.number if installed else 'none'} is installed, last step {last}"
            case GraceOver():
                said = "the grace is over"
        self.lines.append(f"{at:6.1f}  {said}")
        for command in self.leader.step(event, at / 1000):
            if isinstance(command, IssueHeader):
                header = self.last = command.header
                tokens = " ".join(map(str, header.num_tokens))
                to = " ".join(map(str, command.recipients))
                self.lines.append(
                    f"        -> step {header.step_id} of epoch {header.epoch}: tokens [{tokens}] to ranks {to}"
                )
            else:
                self.lines.append(f"        -> wake at {command.at * 1000:.1f}")

    def bid(self, who, decode, prefill, after, at):
        self.say(BidPlaced(who, decode, prefill, after), at)

    def done(self, who, step_id, at, failed=False):
        self.say(StepDone(who, step_id, failed), at)

    def finish(self):
        path, text = TRACES / f"leader_{self.name}.txt", "\n".join(self.lines) + "\n"
        if os.environ.get("EXPERTMESH_REWRITE_TRACES"):
            TRACES.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"the trace {path.name} has changed: rewrite it, read the difference"


def test_replicas_step_together():
    trace = Trace("together")
    trace.bid("a1", 1, 0, 0, at=0)  # before there is an epoch
    trace.say(EpochInstalled(epoch(["a1", "a2", "e1", "e2"])), at=1)
    trace.bid("a2", 4, 0, 0, at=2)  # misses step 1, waits for step 2
    trace.done("a1", 1, at=11)
    trace.bid("a1", 1, 0, 1, at=12)
    trace.done("a2", 2, at=20)
    trace.done("a1", 2, at=21)
    trace.bid("a2", 4, 0, 2, at=22)  # a1 is still sampling: wait for it
    trace.bid("a1", 2, 0, 2, at=23)
    trace.finish()


def test_a_late_member_misses_the_step_and_an_idle_one_is_not_waited_for():
    trace = Trace("late")
    trace.say(EpochInstalled(epoch(["a1", "a2", "e1"])), at=0)
    trace.bid("a1", 1, 0, 0, at=1)
    trace.done("a1", 1, at=3)
    trace.bid("a1", 1, 0, 1, at=4)
    trace.bid("a2", 1, 0, 0, at=5)
    trace.done("a1", 2, at=10)
    trace.bid("a1", 1, 0, 2, at=11)  # step 3 names both
    trace.done("a1", 3, at=20)
    trace.done("a2", 3, at=20)
    trace.bid("a1", 1, 0, 3, at=21)  # a2 is late
    trace.say(GraceOver(), at=23)
    trace.say(GraceOver(), at=26)  # half of the last step's 9 ms: go on without it
    trace.bid("a2", 1, 0, 3, at=27)
    trace.done("a1", 4, at=30)
    trace.bid("a1", 1, 0, 4, at=31)  # step 5 names both again
    trace.done("a1", 5, at=40)
    trace.done("a2", 5, at=40)
    trace.bid("a2", 0, 0, 5, at=41)  # has nothing to do: nobody waits for it
    trace.bid("a1", 1, 0, 5, at=42)
    trace.done("a1", 6, at=50)
    trace.bid("a1", 0, 0, 6, at=51)  # idle: no header
    trace.finish()


def test_the_prefill_budget_is_shared_by_all():
    trace = Trace("prefill")
    trace.say(EpochInstalled(epoch(["a1", "a2", "a3", "e1"])), at=0)
    trace.bid("a1", 1, 0, 0, at=1)
    for who, prefill in (("a2", 10), ("a3", 500)):
        trace.bid(who, 2, prefill, 0, at=2)
    trace.done("a1", 1, at=3)
    trace.bid("a1", 1, 500, 1, at=4)  # 100 tokens: 10 for a2, 45 each for the others
    trace.finish()


def test_a_budget_below_the_number_of_bidders_goes_round():
    trace = Trace("prefill_scarce", max_prefill_tokens=1)
    trace.say(EpochInstalled(epoch(["c1", "c2"])), at=0)
    trace.bid("c1", 0, 5, 0, at=1)
    trace.bid("c2", 0, 5, 0, at=2)
    named = []
    after = {"c1": 0, "c2": 0}
    for step_id in range(1, 7):
        assert trace.last.step_id == step_id
        who = f"c{1 + trace.last.num_tokens.index(1)}"
        named.append(who)
        after[who] = step_id
        for other in ("c1", "c2"):  # both own experts: both take part
            trace.done(other, step_id, at=10 * step_id)
        trace.bid(who, 0, 5, step_id, at=10 * step_id + 1)
    assert named.count("c1") >= 2
    assert named.count("c2") >= 2
    trace.finish()


def test_a_bid_that_crossed_its_answer_is_void():
    trace = Trace("crossed")
    trace.say(EpochInstalled(epoch(["a1", "e1"])), at=0)
    trace.bid("a1", 1, 0, 0, at=1)
    trace.bid("a1", 2, 0, 0, at=2)  # sent before step 1 was known there
    trace.done("a1", 1, at=3)
    trace.done("a1", 1, at=4)
    trace.bid("a1", 3, 0, 1, at=5)
    trace.finish()


def test_the_header_carries_the_trace_of_a_request_in_the_step():
    leader = Leader(max_prefill_tokens=10)
    leader.step(EpochInstalled(epoch(["a1", "a2", "e1"])), 0.0)
    (issued,) = leader.step(BidPlaced("a1", 1, 0, 0), 1.0)
    assert issued.header.traceparent == ""
    leader.step(BidPlaced("a1", 1, 0, 1), 2.0)
    leader.step(BidPlaced("a2", 1, 0, 0, "00-ab-cd-01"), 2.0)
    (issued,) = leader.step(StepDone("a1", 1), 3.0)
    assert issued.header.traceparent == "00-ab-cd-01"


def test_a_failed_step_ends_the_epoch():
    trace = Trace("failed")
    trace.say(EpochInstalled(epoch(["a1", "a2", "e1"])), at=0)
    trace.bid("a1", 1, 0, 0, at=1)
    trace.bid("a2", 1, 0, 0, at=2)
    trace.done("a1", 1, at=3, failed=True)
    trace.bid("a1", 1, 0, 1, at=4)  # no header of a broken epoch
    trace.say(EpochInstalled(epoch(["a1", "a2", "e1"], number=2), 1), at=10)
    trace.finish()


def test_a_step_that_fails_after_its_epoch_was_replaced_does_not_break_the_next():
    leader = Leader(max_prefill_tokens=100)
    leader.step(EpochInstalled(epoch(["a1", "e1", "e2"])), 0.0)
    leader.step(BidPlaced("a1", 1, 0, 0), 1.0)
    leader.step(EpochInstalled(epoch(["a1", "e1"], number=2), 1), 2.0)  # e2's death was heard of first
    leader.step(StepDone("a1", 1, failed=True), 3.0)
    (issued,) = leader.step(BidPlaced("a1", 1, 0, 1), 4.0)
    assert issued.header.epoch == 2


def test_a_step_that_fails_after_it_was_launched_ends_the_epoch_though_another_was_named():
    """On a GPU a step is done when it is in the stream; that it failed is known when the next one is named already."""
    leader = Leader(max_prefill_tokens=100)
    leader.step(EpochInstalled(epoch(["a1", "e1", "e2"])), 0.0)
    leader.step(BidPlaced("a1", 1, 0, 0), 1.0)
    leader.step(StepDone("a1", 1), 2.0)
    (second,) = leader.step(BidPlaced("a1", 1, 0, 1), 3.0)
    leader.step(StepDone("a1", 2), 4.0)
    leader.step(StepDone("a1", 1, failed=True), 5.0)
    assert leader.step(BidPlaced("a1", 1, 0, 2), 6.0) == []
    (third,) = leader.step(EpochInstalled(epoch(["a1", "e1"], number=2), 2), 7.0)
    assert (second.header.epoch, third.header.epoch) == (1, 2)
    leader.step(StepDone("a1", 2, failed=True), 8.0)  # of the epoch before: this one is whole
    leader.step(StepDone("a1", 3), 9.0)
    (fourth,) = leader.step(BidPlaced("a1", 1, 0, 3), 10.0)
    assert fourth.header.epoch == 2


def test_the_header_names_the_smallest_bucket_that_holds_its_largest_source():
    leader = Leader(max_prefill_tokens=100, buckets=(8, 1, 4))
    leader.step(EpochInstalled(epoch(["a1", "a2", "e1"])), 0.0)
    named = []
    for step_id, (first, second) in enumerate([(1, 0), (2, 4), (5, 1), (9, 1)]):
        commands = leader.step(BidPlaced("a2", second, 0, step_id), 1.0) if second else []
        commands += leader.step(BidPlaced("a1", first, 0, step_id), 1.0)
        commands += leader.step(GraceOver(), 1e3 * (step_id + 1))
        for command in commands:
            if isinstance(command, IssueHeader):
                named.append((command.header.num_tokens, command.header.bucket))
                for who in ("a1", "a2"):
                    leader.step(StepDone(who, command.header.step_id), 2.0)
    assert [bucket for tokens, bucket in named if max(tokens) > 8] == [0]
    for tokens, bucket in named:
        assert bucket == next((size for size in (1, 4, 8) if size >= max(tokens)), 0)
    assert {bucket for _, bucket in named} >= {0, 1}


def test_steps_with_prompts_have_few_buckets():
    leader = Leader(max_prefill_tokens=1000, buckets=(1, 2, 4, 8, 12, 16, 20, 24))
    leader.step(EpochInstalled(epoch(["a1", "e1"])), 0.0)
    named = []
    for step_id, (decode, prefill) in enumerate([(1, 0), (9, 0), (9, 1), (2, 40), (30, 482), (30, 995)]):
        (command,) = leader.step(BidPlaced("a1", decode, prefill, step_id), 1.0)
        named.append(command.header.bucket)
        leader.step(StepDone("a1", step_id + 1), 2.0)
    assert named == [1, 12, 16, 64, 512, 1152]
    (command,) = leader.step(BidPlaced("a1", 1100, 1000, 6), 3.0)
    assert command.header.bucket == 0, "above the largest"


@pytest.mark.parametrize("stopped", [True, False])
def test_a_leader_that_leads_again_hears_bids_after_the_lower_steps_of_one_between(stopped):
    """Of a leader between that was new and counted from lower; told of it, or asleep meanwhile."""
    leader = Leader(max_prefill_tokens=100)
    leader.step(EpochInstalled(epoch(["a0", "e0"], 1), 809), 0.0)
    (issued,) = leader.step(BidPlaced("a0", 3, 0, 0), 0.0)
    assert issued.header.step_id == 810
    leader.step(StepDone("a0", 810, False), 0.1)
    if stopped:
        leader.step(EpochInstalled(None), 0.2)
    leader.step(EpochInstalled(epoch(["a0", "e0"], 3), 371), 5.0)  # after steps 360 to 371 of epoch 2
    commands = leader.step(BidPlaced("a0", 3, 0, 371), 5.0)
    commands += leader.step(GraceOver(), 6.0)
    (again,) = [command for command in commands if isinstance(command, IssueHeader)]
    assert (again.header.step_id, again.header.epoch, again.header.num_tokens) == (811, 3, (3, 0))


def test_a_new_epoch_is_named_when_the_step_in_flight_is_over():
    trace = Trace("epoch")
    trace.say(EpochInstalled(epoch(["a1", "e1", "e2"])), at=0)
    trace.bid("a1", 1, 0, 0, at=1)
    trace.say(EpochInstalled(epoch(["a1", "e2", "e1"], number=2), 1), at=2)
    trace.bid("a1", 1, 0, 1, at=3)
    trace.done("a1", 1, at=4)
    trace.say(EpochInstalled(None), at=5)  # another leads now
    trace.done("a1", 2, at=6)
    trace.bid("a1", 1, 0, 2, at=7)
    trace.finish()


# ---- the channel


class Endpoint:
    """Collects what a channel brings."""

    def __init__(self):
        self.frames, self.lost = queue.SimpleQueue(), queue.SimpleQueue()

    def on_frame(self, *frame):
        self.frames.put(frame)


@pytest.fixture
def served():
    end = Endpoint()
    server = ControlServer("leader", HOST, "secret", end.on_frame, end.lost.put)
    yield server, end
    server.close()


def dial(server, own_id="m1", token="secret"):
    end = Endpoint()
    channel = connect(
        own_id,
        HOST,
        server.port,
        interface=HOST,
        cluster_token=token,
        on_frame=end.on_frame,
        on_lost=end.lost.put,
    )
    return channel, end


def test_bids_reports_and_headers_cross_the_channel(served):
    server, end = served
    channel, member = dial(server)
    bid, done = BidPlaced("m1", 7, 1 << 20, 1 << 40, "00-ab-cd-01"), StepDone("m1", 1 << 40, True)
    channel.send(Kind.BID, encode_bid(bid))
    channel.send(Kind.DONE, encode_done(done))
    assert end.frames.get(timeout=10) == ("m1", Kind.BID, encode_bid(bid))
    assert decode_done("m1", end.frames.get(timeout=10)[2]) == done
    assert decode_bid("m1", encode_bid(bid)) == bid
    asks_for_whole = BidPlaced("m1", 7, 0, 1, whole=True)
    assert decode_bid("m1", encode_bid(asks_for_whole)) == asks_for_whole
    header = StepHeader(step_id=3, epoch=2, placement_version=1, num_tokens=(1, 0, 9), traceparent="00-ab-cd-01")
    server.send("m1", Kind.HEADER, header.encode())
    assert StepHeader.decode(member.frames.get(timeout=10)[2]) == header
    channel.close()
    assert end.lost.get(timeout=10) == "m1"
    with pytest.raises(ReplicaLost):
        server.send("m1", Kind.HEADER, b"")


def test_a_wrong_token_is_refused_on_both_sides(served):
    server, end = served
    with pytest.raises(Unauthenticated):
        dial(server, token="wrong")
    impostor = ControlServer("leader", HOST, "another", lambda *_: None, lambda *_: None)
    with pytest.raises(Unauthenticated):
        dial(impostor)
    impostor.close()
    assert end.frames.empty()
    with pytest.raises(ReplicaLost):
        server.send("m1", Kind.HEADER, b"")


@pytest.mark.parametrize("speech", [b"", b"GET / HTTP/1.0\r\n\r\n" + bytes(200), bytes(4000)])
def test_a_stranger_is_hung_up_on(served, speech):
    server, end = served
    with socket.create_connection((HOST, server.port), timeout=10) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(speech)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)  # it may be quicker
        while sock.recv(4096):
            pass  # ends, by a close or a reset
    assert end.frames.empty()
    channel, _ = dial(server)  # and others are served on
    channel.close()


def test_an_oversized_frame_ends_the_channel(served):
    server, end = served
    channel, member = dial(server)
    channel._sock.sendall(b"\xff\xff\xff\xff\x01")
    assert end.lost.get(timeout=10) == "m1"
    assert member.lost.get(timeout=10).endswith(str(server.port))
    channel.close()


def test_a_newer_connection_of_a_member_replaces_the_older(served):
    server, _ = served
    old, old_end = dial(server)
    new, new_end = dial(server)
    assert old_end.lost.get(timeout=10)
    server.send("m1", Kind.HEADER, b"x")
    assert new_end.frames.get(timeout=10)[1:] == (Kind.HEADER, b"x")
    for channel in (old, new):
        channel.close()


def test_the_listener_is_bound_to_the_configured_interface(served):
    server, _ = served
    assert server._listener.getsockname()[0] == HOST
