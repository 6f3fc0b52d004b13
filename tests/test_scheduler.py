"""Which tokens run: decodes first, prompts in chunks, first come first served, the youngest gives way."""

import random

import pytest

from expertmesh.cluster.attention.batch import build
from expertmesh.cluster.attention.kv_cache import KVCache
from expertmesh.cluster.attention.pace import Allowance, Work
from expertmesh.cluster.attention.scheduler import Scheduler
from expertmesh.cluster.attention.sequence import Sequence
from expertmesh.config import SchedulerConfig
from expertmesh.errors import InvalidRequest, KVCacheExhausted, QueueFull
from expertmesh.request import EngineRequest, SamplingParams

BLOCK = 4


class Desk:
    """A scheduler and the sequences that come to it; `step` plays the runner."""

    def __init__(self, num_blocks=32, max_model_len=20_000, prefix=False, attention_parity=0, **limits) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(**limits),
            KVCache(num_blocks, BLOCK, enable_prefix_cache=prefix),
            max_model_len=max_model_len,
            attention_parity=attention_parity,
        )
        self.count = 0

    def add(self, prompt_tokens: int, first: int = 0) -> Sequence:
        prompt = tuple(range(first, first + prompt_tokens))
        request = EngineRequest(request_id=f"r{self.count}", prompt_ids=prompt, sampling=SamplingParams())
        sequence = Sequence.of(request, arrival=self.count)
        self.count += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self, max_tokens=10**6, max_prefill=10**6) -> dict[str, int]:
        """{request: tokens} of one step, committed."""
        scheduled = self.scheduler.schedule(max_tokens, max_prefill)
        self.scheduler.check_integrity()
        build(scheduled, block_size=BLOCK)  # asserts that each token has a slot
        samplers = [s.sequence for s in scheduled if s.samples]
        self.scheduler.advance(scheduled)
        for sequence in samplers:
            sequence.see(1)
        self.scheduler.settle(scheduled)
        self.scheduler.check_integrity()
        return {s.sequence.request_id: s.num_tokens for s in scheduled}


def test_prompt_runs_in_chunks_and_then_decodes():
    desk = Desk()
    sequence = desk.add(10)
    assert desk.step(max_prefill=4) == {"r0": 4}
    assert desk.step(max_prefill=4) == {"r0": 4}
    assert sequence.num_output_tokens == 0
    assert desk.step(max_prefill=4) == {"r0": 2}
    assert sequence.num_output_tokens == 1
    assert desk.scheduler.bid() == (1, 0)
    assert desk.step(max_tokens=1, max_prefill=0) == {"r0": 1}


def test_decodes_come_before_prompts_and_share_one_budget():
    desk = Desk()
    for _ in range(3):
        desk.add(2)
    desk.step()
    desk.add(20, first=100)
    assert desk.scheduler.bid() == (3, 20)
    assert desk.step(max_tokens=8, max_prefill=100) == {"r0": 1, "r1": 1, "r2": 1, "r3": 5}
    assert desk.step(max_tokens=8, max_prefill=2) == {"r0": 1, "r1": 1, "r2": 1, "r3": 2}
    assert desk.step(max_tokens=2, max_prefill=2) == {"r0": 1, "r1": 1}


def test_older_prompt_first():
    desk = Desk()
    desk.add(10)
    desk.add(10, first=50)
    assert desk.step(max_prefill=6) == {"r0": 6}
    assert desk.step(max_prefill=6) == {"r0": 4, "r1": 2}


def test_bid_is_bounded_by_the_budget():
    desk = Desk(max_num_batched_tokens=8, num_blocks=100)
    for _ in range(5):
        desk.add(30)
    assert desk.scheduler.bid() == (0, 8)
    assert sum(desk.step().values()) == 8


def test_no_work_no_bid():
    assert Desk().scheduler.bid() == (0, 0)


def test_max_num_seqs_bounds_the_running_set():
    desk = Desk(max_num_seqs=2)
    for _ in range(4):
        desk.add(3)
    assert desk.step() == {"r0": 3, "r1": 3}
    assert desk.scheduler.bid() == (2, 0)
    assert (desk.scheduler.num_running, desk.scheduler.num_waiting) == (2, 2)


def test_head_of_the_queue_is_not_passed():
    desk = Desk(num_blocks=8)
    desk.add(16)
    desk.step()
    desk.add(24)
    desk.add(1)
    assert desk.step() == {"r0": 1}, "r2 would fit, r1 is before it"


def test_youngest_gives_way_and_comes_back_with_all_it_knows():
    desk = Desk(num_blocks=8)
    old, young = desk.add(11), desk.add(11, first=50)
    desk.step()
    for _ in range(6):  # 32 tokens fit; the 17th of each does not
        desk.step()
    assert desk.scheduler.num_preemptions == 1
    assert young.num_preemptions == 1
    assert (young.num_computed_tokens, young.table.num_blocks) == (0, 0)
    known = young.num_tokens
    assert known > 11
    desk.add(1, first=90)
    desk.scheduler.remove(old)
    assert desk.step()["r1"] == known, "replayed, generated tokens included"
    assert young.num_tokens == known + 1


def test_preempted_are_taken_up_in_their_old_order():
    desk = Desk(num_blocks=9)
    first = desk.add(11)
    desk.add(11, first=50)
    desk.add(7, first=90)
    for _ in range(15):
        desk.step()
    assert [s.request_id for s in desk.scheduler.sequences()] == ["r0", "r1", "r2"]
    assert desk.scheduler.num_running == 1
    desk.scheduler.remove(first)
    desk.step()
    assert [s.request_id for s in desk.scheduler.sequences()] == ["r1", "r2"]


def test_lone_sequence_may_use_the_whole_pool():
    desk = Desk(num_blocks=4)
    sequence = desk.add(16)
    assert desk.step() == {"r0": 16}
    assert sequence.num_tokens == desk.scheduler.max_model_len == 17


def test_cancel_frees_blocks_at_once_wherever_the_sequence_is():
    desk = Desk(num_blocks=8)
    running, waiting = desk.add(20), desk.add(20)
    desk.step(max_prefill=5)
    assert desk.scheduler.cache.num_free_blocks == 3
    desk.scheduler.remove(running)
    assert desk.scheduler.cache.num_free_blocks == 8
    desk.scheduler.remove(waiting)
    desk.scheduler.check_integrity()
    assert desk.scheduler.get("r0") is None


def test_impossible_requests_are_refused_with_the_numbers():
    desk = Desk(num_blocks=4, max_model_len=40)
    with pytest.raises(InvalidRequest, match="at most 39"):
        desk.add(40)
    with pytest.raises(KVCacheExhausted, match="5 KV blocks of 4 tokens, the pool has 4"):
        desk.add(17)
    with pytest.raises(InvalidRequest, match="at least 1"):
        desk.add(0)


def test_full_queue_is_refused_with_a_delay():
    desk = Desk(max_num_waiting=2)
    desk.add(1)
    desk.add(1)
    with pytest.raises(QueueFull) as full:
        desk.add(1)
    assert full.value.retry_after_s > 0


def test_cached_prefix_is_not_computed_again():
    desk = Desk(prefix=True)
    first = desk.add(14)
    desk.step()
    desk.scheduler.remove(first)
    second = desk.add(18)
    assert desk.scheduler.bid() == (0, 18), "a bid is an upper bound"
    assert desk.step() == {"r1": 6}
    assert second.num_cached_tokens == 12


def test_cached_tokens_are_counted_at_the_first_admission_only():
    desk = Desk(num_blocks=8, prefix=True)
    desk.add(11)
    young = desk.add(11, first=50)
    for _ in range(7):
        desk.step()
    assert young.num_preemptions == 1
    desk.scheduler.remove(desk.scheduler.get("r0"))
    assert sum(desk.step().values()) < 11, "its own blocks were still there"
    assert young.num_cached_tokens == 0


@pytest.mark.parametrize("seed", range(30))
def test_any_course_keeps_its_promises(seed):
    """Random arrivals, cancels and grants on a small pool: budgets hold, work that was bid for is done, all ends."""
    rng = random.Random(seed)
    limits = {"max_num_batched_tokens": rng.choice([8, 64]), "max_num_seqs": rng.choice([3, 16])}
    desk = Desk(num_blocks=rng.choice([8, 20]), prefix=rng.random() < 0.5, **limits)
    target: dict[str, int] = {}
    for _ in range(300):
        if desk.count < 25 and rng.random() < 0.3:
            sequence = desk.add(rng.randint(1, 20), first=rng.randrange(3))
            target[sequence.request_id] = rng.randint(1, 12)
        live = list(desk.scheduler.sequences())
        if live and rng.random() < 0.05:
            desk.scheduler.remove(rng.choice(live))
        num_decode, num_prefill = desk.scheduler.bid()
        assert (num_decode + num_prefill > 0) == bool(list(desk.scheduler.sequences()))
        granted_prefill = min(num_prefill, rng.randint(1, 30))
        done = desk.step(num_decode + granted_prefill, granted_prefill)
        if num_decode + granted_prefill:
            assert 0 < sum(done.values()) <= num_decode + granted_prefill
        for sequence in list(desk.scheduler.sequences()):
            if sequence.num_output_tokens >= target[sequence.request_id]:
                desk.scheduler.remove(sequence)
        if desk.count == 25 and not list(desk.scheduler.sequences()):
            break
    assert desk.count == 25
    assert not list(desk.scheduler.sequences())
    assert desk.scheduler.cache.num_free_blocks == desk.scheduler.cache.num_blocks


def test_a_long_prompt_leaves_half_of_the_budget_to_others():
    desk = Desk(num_blocks=4000)
    desk.add(10_000)
    assert desk.step(max_prefill=64) == {"r0": 64}
    desk.add(40)
    desk.add(5)
    assert desk.step(max_prefill=64) == {"r0": 32, "r1": 32}
    assert desk.step(max_prefill=64) == {"r0": 32, "r1": 8, "r2": 5}


def test_prompt_tokens_far_into_a_context_count_for_more_where_decodes_wait():
    desk = Desk(num_blocks=4000, attention_parity=100, max_prefill_tokens_per_step=120)
    desk.add(1)
    assert desk.step() == {"r0": 1}
    long = desk.add(900)
    while long.num_pending_tokens > 1:
        computed, pending = long.num_computed_tokens, long.num_pending_tokens
        count = min(pending, Allowance.of(120, 100).num_tokens(computed))
        if computed >= 100 and count < pending:
            count -= (computed + count) % BLOCK  # most of it is attention: whole blocks
        assert desk.scheduler.bid() == (1, count), "a step is no larger than what runs in it"
        assert desk.step(max_tokens=1 + count, max_prefill=count) == {"r0": 1, "r1": count}
    assert computed > 800


def test_what_steps_took_sets_the_chunk_beside_decodes_and_never_that_of_prompts_alone():
    desk = Desk(num_blocks=4000, max_prefill_tokens_per_step=400, max_num_seqs=64)
    pace = desk.scheduler.pace
    for size in (1, 64):
        pace.observe(Work(size), 0.010)
    for tokens in (100, 200, 400):
        pace.observe(Work(0, tokens), 0.010 + 0.0001 * tokens)
    desk.add(900)
    assert desk.step() == {"r0": 400}
    desk.add(1)
    assert desk.step() == {"r0": 400}
    assert desk.step() == {"r0": 100, "r1": 1}
    desk.add(900)
    assert desk.scheduler.bid() == (2, 150), "2.5 x 10 ms leave 15 ms, and a token takes 0.1 ms"
    assert desk.step() == {"r0": 1, "r1": 1, "r2": 150}


def test_a_crowd_of_prompts_beside_few_decodes_gets_larger_steps():
    desk = Desk(num_blocks=4000, max_prefill_tokens_per_step=2000, max_num_batched_tokens=3000, max_num_seqs=64)
    pace = desk.scheduler.pace
    for size in (1, 64):
        pace.observe(Work(size), 0.010)
    pace.observe(Work(0, 400), 0.050)
    desk.add(1)
    assert desk.step() == {"r0": 1}
    desk.add(300)
    assert desk.scheduler.bid() == (1, 150)
    for _ in range(4):
        desk.add(300)
    assert desk.scheduler.bid() == (1, 900), "4 x 25 ms leave 90"
    assert desk.step() == {"r0": 1, "r1": 300, "r2": 300, "r3": 300}


def test_a_step_without_prompts_is_made_now_and_then_and_the_prompt_goes_on():
    desk = Desk(num_blocks=6000, max_prefill_tokens_per_step=400, max_num_seqs=64)
    desk.scheduler.pace.observe(Work(64), 0.010)
    desk.scheduler.pace.observe(Work(0, 400), 0.050)
    desk.add(1)
    desk.step()
    long, without = desk.add(19_900), 0
    while long.num_pending_tokens > 1:
        bid = desk.scheduler.bid()
        scheduled = desk.scheduler.schedule(sum(bid), bid[1])
        assert sum(item.num_tokens for item in scheduled) == sum(bid)
        desk.scheduler.advance(scheduled)
        for item in scheduled:
            if item.samples:
                item.sequence.see(1)
        desk.scheduler.settle(scheduled)
        desk.scheduler.observe(scheduled, num_others=0, seconds=0.010 + 0.0001 * (sum(bid) - 1))
        without += bid == (1, 0)
    assert without == 3


def test_what_another_replica_is_granted_makes_no_token_dearer():
    desk = Desk(num_blocks=4000, attention_parity=100, max_prefill_tokens_per_step=120)
    desk.add(1)
    desk.step()
    desk.add(900)
    while desk.step()["r1"] == 120:
        pass
    assert desk.scheduler.bid()[1] > 40
    assert desk.step(max_prefill=40) == {"r0": 1, "r1": 40}, "tokens are shared, the cost of attention is not"
    desk.add(900, first=1000)
    decodes, prefill = desk.scheduler.bid()
    taken = desk.step(max_tokens=decodes + prefill, max_prefill=prefill)
    assert decodes == 1
    assert sum(taken.values()) == 1 + prefill
    assert set(taken) == {"r0", "r1", "r2"}


def test_a_prompt_alone_takes_the_whole_budget_whatever_its_context():
    desk = Desk(num_blocks=4000, attention_parity=100)
    desk.add(900)
    assert [desk.step(max_prefill=120) for _ in range(3)] == [{"r0": 120}] * 3
