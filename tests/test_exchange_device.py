"""The device exchange's suite without a GPU: its index math, emulated, gives what every back end must; buffers and the
kernels' arguments are laid out as the kernels read them; the kernels compile cleanly."""

import re
import struct
from dataclasses import replace

import exchange_emulated
import exchange_worlds
import process_world
import pytest
import torch
from compiling import compile_for
from exchange_conformance import LAYOUTS, TOP_K, check_device, make_epoch

from expertmesh.errors import EpochError, KernelError
from expertmesh.kernels import jit, peer_exchange
from expertmesh.kernels.nccl_pack_reference import owners_and_slots
from expertmesh.router import group
from expertmesh.router.backends import choose_backend
from expertmesh.router.device_exchange import copies_table
from expertmesh.router.device_step import DeviceStep
from expertmesh.router.dispatch import plan
from expertmesh.router.epoch import StepHeader
from expertmesh.router.exchange import RowShape
from expertmesh.router.exchange_nccl import NcclExchange
from expertmesh.router.exchange_peer import peer_layouts
from expertmesh.router.group import RendezvousStore

CPU = torch.device("cpu")
SHAPE = RowShape(hidden_size=24, top_k=TOP_K, dtype=torch.bfloat16)


@pytest.mark.parametrize("bucket", [0, 48])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_index_math_brings_every_row_to_its_expert_and_back(layout, bucket):
    epoch = make_epoch(layout, redundant=5)
    exchanges = exchange_emulated.emulate(epoch, SHAPE, 256)
    pairs = exchange_emulated.run_ranks(
        len(exchanges), lambda rank: check_device(rank, epoch, exchanges[rank], SHAPE, bucket=bucket), SHAPE.device
    )
    assert sum(pairs) > 500


@pytest.mark.parametrize("redundant", [0, 7])
def test_a_device_sends_each_token_to_the_copy_that_a_host_plan_names(redundant):
    placement = make_epoch("4 colocated", redundant=redundant).placement
    ids = torch.rand(50, 12).argsort(1)[:, :TOP_K].to(torch.int32)
    ids[3, 1] = ids[7] = -1
    for source in (0, 3):
        host = plan(ids, placement, 2, source)
        owner, slot = owners_and_slots(ids, copies_table(placement, peer_exchange.TABLE_WIDTH)[2], source)
        row = 0
        for ep_rank, count in enumerate(host.send_counts):
            needed = (owner == ep_rank).any(1).nonzero().flatten()
            assert host.row_to_token[row : row + count].tolist() == needed.tolist()
            wanted = torch.where(owner == ep_rank, slot, -1)[needed]
            assert torch.from_numpy(host.row_slot_ids[row : row + count]).equal(wanted)
            row += count


class Products:
    """Experts whose products tell layer and expert apart."""

    capturable, graph_version = True, 0

    def __init__(self, placement, ep_rank):
        self.placement, self.ep_rank = placement, ep_rank

    def forward(self, layer_id, rows, slot_ids):
        from exchange_conformance import multiply_all

        logical = self.placement.local_slots(layer_id, self.ep_rank).to(rows.device)
        return multiply_all(rows, slot_ids, logical, layer_id)


def step_outputs(epoch, exchange, rank, header, shape):
    """moe of every layer on this rank's seeded tokens."""
    exchange.use_placement(epoch.placement)
    ep_rank = epoch.expert_ranks.index(rank) if epoch.members[rank].expert else -1
    experts = Products(epoch.placement, ep_rank) if ep_rank >= 0 else None
    step = DeviceStep(header, rank=rank, placement=epoch.placement, exchange=exchange, experts=experts, shape=shape)
    if not header.num_tokens[rank]:
        step.serve()
        return []
    generator, outputs = torch.Generator().manual_seed(rank), []
    for layer_id in epoch.placement.moe_layers:
        n = header.num_tokens[rank]
        x = torch.randn(n, shape.hidden_size, generator=generator).to(shape.dtype).to(shape.device)
        ids = torch.rand(n, 12, generator=generator).argsort(1)[:, :TOP_K].to(torch.int32).to(shape.device)
        weights = torch.rand(n, TOP_K, generator=generator).to(shape.device)
        outputs.append((step.moe(layer_id, x, ids, weights), x, ids, weights))
    if shape.device.type == "cuda":
        torch.cuda.current_stream(shape.device).synchronize()
    step.finish()
    return outputs


def run_step(epoch, exchanges, header, shape):
    """[rank] -> its outputs; attention ranks that the header does not name take no part."""
    named = [r for r, m in enumerate(epoch.members) if m.expert or header.num_tokens[r]]
    return exchange_emulated.run_ranks(
        len(epoch.members),
        lambda rank: step_outputs(epoch, exchanges[rank], rank, header, shape) if rank in named else [],
        shape.device,
    )


def reference_outputs(outputs, epoch, shape):
    """The same tokens with all experts in one place."""
    from exchange_conformance import factor

    from expertmesh.kernels import reference

    for (out, x, ids, weights), layer_id in zip(outputs, epoch.placement.moe_layers, strict=True):
        y = x[:, None] * factor(ids, layer_id).to(shape.dtype)[:, :, None]
        yield out, reference.combine(y.cpu(), ids.cpu(), weights.cpu()).to(shape.dtype)


@pytest.mark.parametrize("num_tokens", [(3, 0, 0, 0), (70, 9, 0, 0), (1, 1, 0, 0)])
def test_a_step_over_several_ranks_equals_the_local_one_parts_included(num_tokens):
    """70 tokens are two parts of at most 64 on every rank."""
    epoch = make_epoch("2 attention + 2 shards")
    header = StepHeader(step_id=1, epoch=1, placement_version=1, num_tokens=num_tokens)
    exchanges = exchange_emulated.emulate(epoch, SHAPE, 64)
    results = run_step(epoch, exchanges, header, SHAPE)
    compared = 0
    for outputs in results:
        for out, wanted in reference_outputs(outputs, epoch, SHAPE) if outputs else ():
            assert out.equal(wanted)
            compared += out.shape[0]
    assert compared == sum(num_tokens) * len(epoch.placement.moe_layers)


def test_rows_beyond_the_bucket_are_refused_before_a_peer_waits():
    epoch = make_epoch("one rank")
    (exchange,) = exchange_emulated.emulate(epoch, SHAPE, 64)
    exchange.use_placement(epoch.placement)
    header = StepHeader(step_id=1, epoch=1, placement_version=1, num_tokens=(3,), bucket=4)
    step = DeviceStep(header, rank=0, placement=epoch.placement, exchange=exchange, experts=None, shape=SHAPE)
    with pytest.raises(EpochError, match="5 rows"):
        step.rows(0, torch.zeros(5, 24, dtype=torch.bfloat16), torch.zeros(5, TOP_K, dtype=torch.int32))


@pytest.mark.parametrize("bucket", [0, 48])
@pytest.mark.parametrize("layout", ["2 colocated", "1 attention + 2 shards", "4 colocated"])
def test_the_nccl_exchange_moves_rows_in_both_forms_here_over_gloo(layout, bucket):
    """Turns of up to 64 rows are padded, larger ones exact. In these layouts every rank takes part in every step: gloo
    has no grouped sends between some."""
    store = RendezvousStore("127.0.0.1")
    pairs = process_world.run(
        exchange_worlds.conform_device,
        exchange_worlds.num_ranks(layout),
        "gloo",
        layout,
        bucket,
        0,
        store.port,
        f"{layout}-{bucket}",
    )
    assert sum(pairs) > 500


class DeadWire:
    """A communicator after its abort: it moves nothing, and what stood in the target stays there."""

    def alltoall_base(self, out, data, receive, send, options):
        out.copy_(torch.randint(0, 127, out.shape, dtype=torch.uint8) if out.dtype == torch.uint8 else out)
        return self

    def wait(self):
        pass


def test_what_stands_in_memory_after_an_abort_asks_no_expert_that_is_not_there():
    """The rest of a captured step runs on it, and an index beyond a table would end the GPU's context."""
    epoch = make_epoch("2 colocated")
    deadlines = {"timeout_base_s": 1.0, "timeout_per_row_s": 0.0}
    exchange = NcclExchange(DeadWire(), epoch, 0, SHAPE, capacity=8, exact_above=8, **deadlines)
    exchange.use_placement(epoch.placement)
    exchange.begin(StepHeader(step_id=1, epoch=1, placement_version=1, num_tokens=(5, 5)), stride=8, attempt=0)
    ids = torch.arange(5 * TOP_K, dtype=torch.int32).view(5, TOP_K) % 12
    rows, slots = exchange.dispatch(0, torch.zeros(5, 24, dtype=torch.bfloat16), ids, 8)
    assert rows.shape == (16, 24)
    assert slots.shape == (16, TOP_K)
    assert slots.max() < epoch.placement.slots_per_rank


class FakeMemory:
    """A rank's buffer without a GPU: what `meet_peers` asks of it."""

    device = torch.device("cpu")

    def __init__(self, rank):
        self.base, self.rank = 1000 + rank, rank

    def card(self):
        return b"\0card of " + bytes([self.rank])

    def open(self, card, layout):
        if layout is None:
            raise KernelError("a peer's buffer has 1 bytes, 2 expected")
        return 100 * self.rank + card[-1]


def test_peers_meet_by_opaque_bytes_in_the_epochs_store():
    store = RendezvousStore("127.0.0.1")
    epoch = make_epoch("4 colocated", rendezvous_key="meet", store_host="127.0.0.1", store_port=store.port)
    met = exchange_emulated.run_ranks(
        4, lambda rank: group.meet_peers(epoch, rank, FakeMemory(rank), ["layout"] * 4, timeout_s=20.0), CPU
    )
    for rank in range(4):
        assert met[rank] == [1000 + rank if p == rank else 100 * rank + p for p in range(4)]


def test_a_peer_that_does_not_come_or_fit_fails_the_preparation():
    store = RendezvousStore("127.0.0.1")
    epoch = make_epoch("2 colocated", rendezvous_key="absent", store_host="127.0.0.1", store_port=store.port)
    with pytest.raises(EpochError, match="buffers of 2 members did not meet within 0 s"):
        group.meet_peers(epoch, 0, FakeMemory(0), ["layout"] * 2, timeout_s=0.3)
    with pytest.raises(EpochError, match="1 bytes, 2 expected"):
        exchange_emulated.run_ranks(
            2, lambda rank: group.meet_peers(epoch, rank, FakeMemory(rank), [None] * 2, timeout_s=20.0), CPU
        )


def test_the_back_end_follows_from_where_the_members_are():
    def epoch(*gpus):
        first = make_epoch("2 colocated")
        return replace(first, members=tuple(replace(first.members[0], gpu=gpu) for gpu in gpus))

    assert choose_backend(epoch("h/1"), "nccl") == "local"
    assert choose_backend(epoch("", ""), "auto") == "gloo"
    assert choose_backend(epoch("h/1", "h/2"), "auto") == "peer"
    assert choose_backend(epoch("h/1", "h/2"), "nccl") == "nccl"
    assert choose_backend(epoch("h/1", "i/2"), "auto") == "nccl"
    with pytest.raises(EpochError, match="CPUs and on GPUs"):
        choose_backend(epoch("", "h/1"), "auto")
    with pytest.raises(EpochError, match="peer with members on CPUs"):
        choose_backend(epoch("", ""), "peer")


# ------------------------------------------------------------------------------------------------ what the kernels read
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_a_buffer_do_not_overlap_and_fill_it(layout):
    epoch = make_epoch(layout)
    for member, buffer in zip(epoch.members, peer_layouts(epoch, SHAPE, 100), strict=True):
        num_rows = buffer.num_sources * 100 if member.expert else 0
        assert buffer.rows_at == peer_exchange.CONTROL_BYTES
        assert buffer.slots_at == buffer.rows_at + num_rows * 48
        assert buffer.answers_at % 256 == 0
        assert buffer.answers_at >= buffer.slots_at + num_rows * TOP_K * 4
        assert buffer.num_bytes == buffer.answers_at + (100 * TOP_K * 48 if member.attention else 0)


def test_the_mesh_argument_is_the_struct_of_the_kernels():
    epoch = make_epoch("1 attention + 2 shards")
    layouts = peer_layouts(epoch, SHAPE, 8)
    bases = [0x10000, 0x20000, 0x30000]
    owners = [(r, bases[r], layouts[r]) for r in epoch.expert_ranks]
    sources = [(r, bases[r], layouts[r]) for r in epoch.attention_ranks]
    packed = peer_exchange.mesh_argument(bases[1], owners, sources, own_owner=0, own_source=-1)
    words = struct.unpack("<9Q5i4x", packed)
    assert words[:4] == (bases[1], bases[1], bases[2], bases[0])
    assert words[4:6] == (bases[1] + 4096, bases[2] + 4096)
    assert words[6:8] == tuple(bases[r] + layouts[r].slots_at for r in (1, 2))
    assert words[8] == bases[0] + layouts[0].answers_at
    assert words[9:] == (1, 2, 0, 0, -1)


def test_offsets_of_the_control_block_are_those_of_the_source():
    """The struct's fields, with their sizes, in order."""
    text = (jit._DIRECTORY / "peer_exchange.cu").read_text()
    body = re.search(r"struct Control \{(.*?)\n\};", text, re.DOTALL)[1]
    at, offsets = 0, {}
    for line in body.splitlines():
        if m := re.match(r"\s*(u32|u64) ([^;]+);", line):
            size = 4 if m[1] == "u32" else 8
            for name, count in re.findall(r"(\w+)(?:\[(\d+)\])?", m[2]):
                at = -(-at // size) * size
                offsets[name] = at
                at += size * int(count or 1)
    verdict = peer_exchange.VERDICT_AT
    assert offsets["poison"] == peer_exchange.POISON_AT
    assert offsets["bad_return"] == peer_exchange.BAD_RETURN_AT + verdict
    assert offsets["error"] == peer_exchange.ERROR_AT + verdict
    assert offsets["bad_dispatch"] == peer_exchange.BAD_DISPATCH_AT + verdict
    assert peer_exchange.BAD_DISPATCH_AT + 8 <= peer_exchange.VERDICT_BYTES
    assert at <= peer_exchange.CONTROL_BYTES
    control = peer_exchange.initial_control()
    words = struct.unpack(f"<{len(control) // 8}Q", control)
    none = {i for i, word in enumerate(words) if word == peer_exchange.NONE}
    assert none == {offsets["bad_return"] // 8 + i for i in range(64)} | {
        offsets["error"] // 8,
        offsets["bad_dispatch"] // 8,
    }


@pytest.mark.parametrize(
    "defines",
    [
        {"EARLY_NEXT": 1},
        {"HIDDEN": 2048, "NUM_SOURCES": 1, "NUM_OWNERS": 1},
        {"HIDDEN": 24, "TOP_K": 4, "NUM_SOURCES": 2, "NUM_OWNERS": 3},
        {"HIDDEN": 4096, "NUM_SOURCES": 16, "NUM_OWNERS": 16, "FLOAT32": 1},
    ],
    ids=["235B", "30B", "tiny", "wide"],
)
def test_the_kernels_compile_without_spills(defines, private_cubins):
    for compiled in compile_for(jit.SUPPORTED_ARCHS, "peer_exchange.cu", defines):
        uses = compiled.use()
        assert {use.name for use in uses} == {"begin", "dispatch", "answer"}
        assert all(use.clean for use in uses), (compiled.key, uses)
