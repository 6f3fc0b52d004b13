"""The records that every exchange, header and report of a step carries: member, epoch, step header.

Why: a collective is safe only if every rank knows the same names, counts and placement before it starts. An **epoch**
is immutable: number (a fence), membership (owns the communicator) and placement version (a table). All change is a
new epoch, entered at a step boundary by all. A **header** names one step: who sends how many rows at most, in which
epoch. What the header says, every named rank does; no local condition decides a collective. Idea: torchft's quorum,
Raft's terms, vLLM's data-parallel step coordination."""

import struct
from dataclasses import dataclass

from ..errors import EpochError
from .placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of the mesh. `member_id` = replica tag + "#" + incarnation; its index in `Epoch.members` is its
    rank in the communicator, `ep_rank` its place among the members that own experts."""

    member_id: str
    attention: bool  # owns KV and sends tokens
    expert: bool  # owns physical experts
    host: str = "127.0.0.1"  # address of its data interface
    control_port: int = 0  # where its control channel listens (see control.py)
    store_port: int = 0  # where its rendezvous store listens, used in epochs that it leads (see group.py)
    copies_port: int = 0  # where it gives copies of its experts (see experts/copies.py)
    gpu: str = ""  # "HOST/GPU" where its rows live on a GPU (see backends.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """Immutable record of who works together and where every physical expert is."""

    number: int
    members: tuple[Member, ...]
    placement: Placement
    rendezvous_key: str = ""  # random; prefixes the store keys of the communicator
    store_host: str = ""  # rendezvous store (TCPStore) of the communicator
    store_port: int = 0

    @property
    def placement_version(self) -> int:
        return self.placement.version

    @property
    def attention_ranks(self) -> tuple[int, ...]:
        return tuple(i for i, m in enumerate(self.members) if m.attention)

    @property
    def expert_ranks(self) -> tuple[int, ...]:
        """Communicator ranks of the expert owners; position in this tuple = ep_rank."""
        return tuple(i for i, m in enumerate(self.members) if m.expert)

    @property
    def leader_rank(self) -> int:
        """The first attention member issues the step headers."""
        return self.attention_ranks[0]

    def rank_of(self, member_id: str) -> int:
        for rank, member in enumerate(self.members):
            if member.member_id == member_id:
                return rank
        raise EpochError(f"member {member_id!r} is not in epoch {self.number}")

    def same_membership(self, other: "Epoch") -> bool:
        """True when a communicator of `other` serves this epoch too."""
        return self.members == other.members and self.rendezvous_key == other.rendezvous_key


WHOLE = 1  # of StepHeader.flags: every pair's answer has a place of its own, as a source asked (exchange_nccl.py)
_HEADER = struct.Struct("!4sQQQIHH")  # magic, step_id, epoch, placement_version, bucket, flags, len(num_tokens)
_MAGIC = b"EMH1"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHeader:
    """One step, known to all named ranks before it starts.

    num_tokens[rank] = most token rows that this member of the epoch may send in each layer; 0 = not a source (it still
    serves its experts if it owns any). `bucket` = graph size on GPU, 0 = eager. `flags`: WHOLE or 0. `traceparent` =
    W3C context of the step."""

    step_id: int
    epoch: int
    placement_version: int
    num_tokens: tuple[int, ...]
    bucket: int = 0
    flags: int = 0
    traceparent: str = ""

    def encode(self) -> bytes:
        head = _HEADER.pack(
            _MAGIC, self.step_id, self.epoch, self.placement_version, self.bucket, self.flags, len(self.num_tokens)
        )
        return head + struct.pack(f"!{len(self.num_tokens)}I", *self.num_tokens) + self.traceparent.encode()

    @classmethod
    def decode(cls, data: bytes) -> "StepHeader":
        if len(data) < _HEADER.size:
            raise EpochError(f"step header of {len(data)} bytes, at least {_HEADER.size} expected")
        magic, step_id, epoch, version, bucket, flags, count = _HEADER.unpack_from(data)
        end = _HEADER.size + 4 * count
        if magic != _MAGIC or len(data) < end:
            raise EpochError("not a step header of this version")
        num_tokens = struct.unpack_from(f"!{count}I", data, _HEADER.size)
        return cls(
            step_id=step_id,
            epoch=epoch,
            placement_version=version,
            num_tokens=num_tokens,
            bucket=bucket,
            flags=flags,
            traceparent=data[end:].decode(),
        )

    @property
    def sources(self) -> tuple[int, ...]:
        return tuple(rank for rank, n in enumerate(self.num_tokens) if n)
