"""The Cluster service: who serves what, and what an operator may ask for.

The topology's model and gateways are for any client. Members, decisions and the operator's calls are for callers on
this host or with the cluster token; what is asked for is the Conductor's to carry out."""

from dataclasses import fields
from typing import Protocol

import grpc

from ...errors import InvalidRequest, Unauthenticated, Unavailable
from ...proto import expertmesh_pb2 as pb
from ..status import ClusterState, ProcessStatus, ScaleWish
from .link import TOKEN_KEY, token_matches

MAX_SHARDS = 4096


class TopologySource(Protocol):
    """Who serves what, as the Conductor knows it."""

    async def state(self) -> ClusterState: ...


class Operator(TopologySource, Protocol):
    """The Conductor as an operator uses it. Each call answers with one line for people."""

    async def scale(self, wish: ScaleWish) -> str: ...

    async def drain(self, member_id: str) -> str: ...

    async def rebalance(self, reason: str) -> str: ...


class ClusterService:
    """`facts`: the fields of the topology that never change while a gateway lives."""

    def __init__(self, conductor: TopologySource | None, facts: pb.Topology, cluster_token: str) -> None:
        self._conductor, self._facts, self._cluster_token = conductor, facts, cluster_token
        self.address = ""  # of this gateway, once it listens

    async def get_topology(self, _request: pb.GetTopologyRequest, context: grpc.aio.ServicerContext) -> pb.Topology:
        trusted = self._trusts(context)
        if self._conductor is None:
            return pb.Topology(**{f.name: v for f, v in self._facts.ListFields()}, gateways=[self.address])
        topology = encode_topology(await self._conductor.state(), self._facts)
        if not trusted:
            del topology.members[:]
            del topology.decisions[:]
        return topology

    async def scale(self, request: pb.ScaleRequest, context: grpc.aio.ServicerContext) -> pb.OperationResult:
        operator = self._operator(context)
        for name in ("num_shards", "min_shards", "max_shards"):
            if getattr(request, name) > MAX_SHARDS:
                raise InvalidRequest(name, getattr(request, name), f"at most {MAX_SHARDS}")
        if request.num_shards and (request.min_shards or request.max_shards):
            raise InvalidRequest("num_shards", request.num_shards, "a fixed number or bounds, not both")
        if request.max_shards and request.min_shards > request.max_shards:
            raise InvalidRequest("min_shards", request.min_shards, f"at most max_shards ({request.max_shards})")
        wish = ScaleWish(num_shards=request.num_shards, min_shards=request.min_shards, max_shards=request.max_shards)
        return pb.OperationResult(summary=await operator.scale(wish))

    async def drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext) -> pb.OperationResult:
        return pb.OperationResult(summary=await self._operator(context).drain(request.member_id))

    async def rebalance(self, _request: pb.RebalanceRequest, context: grpc.aio.ServicerContext) -> pb.OperationResult:
        return pb.OperationResult(summary=await self._operator(context).rebalance("asked for"))

    def _trusts(self, context: grpc.aio.ServicerContext) -> bool:
        """Whether the caller is on this host or has the token; Unauthenticated where it has a wrong one."""
        metadata = context.invocation_metadata() or ()
        if any(key == TOKEN_KEY for key, _ in metadata):
            if not token_matches(metadata, self._cluster_token):
                raise Unauthenticated(f"the cluster token in {TOKEN_KEY} is wrong")
            return True
        return not self._cluster_token or is_local(context.peer())

    def _operator(self, context: grpc.aio.ServicerContext) -> Operator:
        if not self._trusts(context):
            raise Unauthenticated(f"operating the cluster from another host needs its token in {TOKEN_KEY}")
        if self._conductor is None or not hasattr(self._conductor, "scale"):
            raise Unavailable("this gateway has no Conductor that could carry it out")
        return self._conductor  # type: ignore[return-value]  # just looked at


def is_local(peer: str) -> bool:
    """Whether a gRPC peer name is of this host."""
    return peer.startswith(("ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D", "unix:"))


def encode_topology(state: ClusterState, facts: pb.Topology) -> pb.Topology:
    topology = pb.Topology(epoch=state.epoch, placement_version=state.placement_version, gateways=state.gateways)
    topology.MergeFrom(facts)
    for process in state.processes:
        if process.role != "gateway":
            topology.members.append(_encode_member(process, state))
    for decision in state.decisions:
        topology.decisions.add(at=decision.at, text=decision.text)
    return topology


def _encode_member(process: ProcessStatus, state: ClusterState) -> pb.MemberStatus:
    member = pb.MemberStatus(
        member_id=process.name,
        attention=process.attention,
        expert=process.expert,
        ep_rank=state.ranks.get(process.name, -1),
        age_s=state.ages_s.get(process.name, 0.0),
    )
    for name in _MEMBER_FIELDS:
        setattr(member, name, getattr(process, name))
    return member


_MEMBER_FIELDS = tuple({f.name for f in fields(ProcessStatus)} & set(pb.MemberStatus.DESCRIPTOR.fields_by_name))
