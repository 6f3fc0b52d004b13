"""Which tokens run in the next step: one token budget, no prefill phase, preemption by replay. Pure.

Every running sequence has known and computed tokens (`sequence.py`). Decodes (one token pending) come first, so that a
long prompt never stalls them; what is left of the budget goes to prompts in chunks, oldest first. Admission is strictly
first come, first served and takes blocks for all known tokens at once, so a prompt never stops halfway for lack of
blocks; it leaves one block for each running sequence to grow into. When a decode finds no block the youngest running
sequence gives up all of its blocks and goes back to the head of the queue; it later computes its known tokens again,
generated ones included (or finds them in the prefix cache), and goes on as if nothing had been.
Invariant: every running sequence is older than every waiting one. Idea: vLLM v1."""

from collections import deque
from collections.abc import Iterator

from ...config import SchedulerConfig
from ...errors import InvalidRequest, KVCacheExhausted, QueueFull
from ...router.leader import PROMPT_BUCKETS
from .batch import ScheduledTokens
from .kv_cache import KVCache
from .pace import Allowance, Pace, Work
from .sequence import Sequence

_LONG_PROMPT = 4  # steps' whole prefill budgets: a prompt that needs more leaves half to others


class Scheduler:
    """Owns the queue and the running set; the engine thread is its only caller."""

    def __init__(
        self, config: SchedulerConfig, cache: KVCache, *, max_model_len: int, attention_parity: int = 0
    ) -> None:
        """`attention_parity`: the context at which attention costs a token as much as everything else
        (`ModelConfig.attention_parity_tokens`); 0 = count every prompt token alike."""
        self.config = config
        self.cache = cache
        self._parity = attention_parity
        self.pace = Pace(
            config.max_step_stretch,
            most_decodes=min(config.max_num_seqs, config.max_num_batched_tokens),
            parity=attention_parity,
        )
        # The end of the context: the checkpoint's, or what the whole KV pool holds. The last token needs no KV.
        self.max_model_len = min(max_model_len, cache.num_blocks * cache.block_size + 1)
        self._model_len = max_model_len
        self._max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # oldest first
        self._by_id: dict[str, Sequence] = {}
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def sequences(self) -> Iterator[Sequence]:
        """All unfinished ones, oldest first."""
        yield from self._running
        yield from self._waiting

    def get(self, request_id: str) -> Sequence | None:
        return self._by_id.get(request_id)

    def check(self, num_known_tokens: int) -> None:
        """Raise for a request that could never run: its known tokens must leave room for one more."""
        if num_known_tokens < 1:
            raise InvalidRequest("prompt_ids", num_known_tokens, "at least 1 token")
        if num_known_tokens >= self._model_len:
            raise InvalidRequest(
                "prompt_ids", f"{num_known_tokens} tokens", f"at most {self._model_len - 1} (the context)"
            )
        if num_known_tokens >= self.max_model_len:
            cache = self.cache
            raise KVCacheExhausted(
                f"request needs {cache.blocks_for(num_known_tokens)} KV blocks of {cache.block_size} tokens, "
                f"the pool has {cache.num_blocks}; raise cache.kv_memory_bytes or shorten the prompt",
                retry_after_s=60.0,
            )

    def check_queue(self, num_waiting: int) -> None:
        """Raise QueueFull where one more waiting request is too many."""
        if num_waiting >= self.config.max_num_waiting:
            raise QueueFull(
                f"{num_waiting} requests wait on this replica, the bound is {self.config.max_num_waiting}; "
                "retry later or add attention replicas",
                retry_after_s=min(30.0, 0.5 + num_waiting / max(1, self._max_num_seqs)),
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, which must be younger than all others."""
        if sequence.request_id in self._by_id:
            raise InvalidRequest("request_id", sequence.request_id, "an id that is not running already")
        self.check(sequence.num_tokens)
        self.check_queue(len(self._waiting))
        self._by_id[sequence.request_id] = sequence
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished, cancelled or failed sequence and free its blocks at once."""
        del self._by_id[sequence.request_id]
        if sequence.table.num_blocks:
            self.cache.release(sequence.table)
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)

    def bid(self) -> tuple[int, int]:
        """(decode tokens, prefill tokens) that the next `schedule` could use at most: a step is as large as its header
        says, so what a long context makes too dear is not asked for."""
        num_decode = sum(1 for s in self._running if s.num_pending_tokens == 1 and self._goes_on(s))
        prompts = [s for s in self._running if s.num_pending_tokens > 1]
        num_tokens = self.config.max_num_batched_tokens - num_decode
        left = self._prefill_budget(num_tokens, num_decode, len(prompts) + len(self._waiting))
        num_prefill = sum(left.take(s, alone=len(prompts) == 1 and not self._waiting) for s in prompts)
        if self._waiting and not left.is_spent and self._can_admit(self._waiting[0]):
            for sequence in self._waiting:
                if left.is_spent:
                    break
                num_prefill += left.take(sequence, alone=len(self._waiting) == 1)
        return num_decode, num_prefill

    def schedule(self, max_tokens: int, max_prefill: int) -> list[ScheduledTokens]:
        """Choose at most `max_tokens` tokens, at most `max_prefill` of them of prompts or replays, with their blocks.

        A decode that finds no block preempts the youngest. When the step is launched `advance` counts what is returned
        as computed; `settle` when it has succeeded, `retreat` when it is void."""
        max_tokens = min(max_tokens, self.config.max_num_batched_tokens)
        scheduled = self._schedule_decodes(max_tokens)
        budget = min(max_tokens - len(scheduled), max_prefill)
        prompts = [s for s in self._running if s.num_pending_tokens > 1]
        left = self._prefill_budget(budget, len(scheduled), len(prompts) + len(self._waiting))
        for sequence in prompts:
            if (count := left.take(sequence, alone=len(prompts) == 1 and not self._waiting)) > 0:
                scheduled.append(ScheduledTokens.next_of(sequence, count))
        while not left.is_spent and self._waiting and self._admit(self._waiting[0]):
            sequence = self._running[-1]
            count = left.take(sequence, alone=not self._waiting)
            scheduled.append(ScheduledTokens.next_of(sequence, count))
        return scheduled

    def observe(self, scheduled: list[ScheduledTokens], *, num_others: int, seconds: float) -> None:
        """A step took so long, with so many tokens of other replicas in it; 0 = it was not as others of its kind."""
        chunks = [item for item in scheduled if item.num_tokens > 1]
        work = Work(
            num_decodes=len(scheduled) - len(chunks),
            num_prompt_tokens=sum(item.num_tokens for item in chunks),
            reach=sum(item.num_tokens * (item.start + item.num_tokens // 2) for item in chunks),
            num_others=num_others,
        )
        self.pace.observe(work, seconds)

    @property
    def may_preempt(self) -> bool:
        """The next `schedule` may have to take blocks away: no step may be in flight then, since one that is void runs
        again and reads the blocks of all its sequences."""
        return self.cache.num_free_blocks < len(self._running)

    def advance(self, scheduled: list[ScheduledTokens]) -> None:
        """The step is on its way: what is scheduled next comes after its tokens, the drawn ones included."""
        for item in scheduled:
            item.sequence.num_computed_tokens += item.num_tokens
            if item.samples:
                item.sequence.expect()

    def settle(self, scheduled: list[ScheduledTokens]) -> None:
        """The step succeeded: its tokens are in KV now, and full blocks may be shared."""
        for item in scheduled:
            if self._by_id.get(item.sequence.request_id) is item.sequence:
                self.cache.name_computed(item.sequence.table, item.sequence.token_ids, item.end)

    def retreat(self, scheduled: list[ScheduledTokens]) -> None:
        """The step is void: as if it had not been launched. Of steps in flight the newest first."""
        for item in scheduled:
            if item.samples:
                item.sequence.retract()
            item.sequence.num_computed_tokens = item.start

    def check_integrity(self) -> None:
        """Assert that queue, running set and blocks agree."""
        self.cache.check_integrity(s.table for s in self._running)
        assert all(s.table.num_blocks == 0 and s.num_computed_tokens == 0 for s in self._waiting)
        ages = [s.arrival for s in self.sequences()]
        assert ages == sorted(ages), "a running sequence is younger than a waiting one"
        assert {s.request_id for s in self.sequences()} == set(self._by_id)
        for s in self._running:
            assert s.num_computed_tokens < s.num_tokens
            assert s.num_computed_tokens <= s.table.num_blocks * self.cache.block_size

    def _prefill_budget(self, num_tokens: int, num_decodes: int, num_prompts: int) -> "_PrefillBudget":
        most = self.config.max_prefill_tokens_per_step
        allowance = Allowance.of(most, self._parity if num_decodes else 0)
        if num_decodes and (learned := self.pace.allowance(num_decodes, num_prompts)):
            allowance = learned
            if num_prompts <= num_decodes:
                most = min(most, max(PROMPT_BUCKETS[-1] - num_decodes, 1024))  # eager steps are told late
        return _PrefillBudget(min(num_tokens, most), allowance, self.cache.block_size)

    def _schedule_decodes(self, max_tokens: int) -> list[ScheduledTokens]:
        scheduled: list[ScheduledTokens] = []
        index = 0
        while index < len(self._running) and len(scheduled) < max_tokens:
            sequence = self._running[index]
            is_decode = sequence.num_tokens - sequence.num_computed_tokens == 1 and self._goes_on(sequence)
            if is_decode and self._make_room(sequence):
                scheduled.append(ScheduledTokens.next_of(sequence, 1))
            index += 1
        return scheduled

    def _goes_on(self, sequence: Sequence) -> bool:
        """Not so where the token that a step in flight draws is its last, whatever that is."""
        return not sequence.num_unseen or not sequence.is_full(self.max_model_len)

    def _make_room(self, sequence: Sequence) -> bool:
        """Blocks for the sequence's pending token, taken from the youngest if need be; False = it was the youngest."""
        while not self.cache.grow(sequence.table, sequence.num_tokens):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        popped = self._running.pop()
        assert popped is sequence
        assert not sequence.num_unseen, "preempted while a step draws for it"
        self.cache.release(sequence.table)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._waiting.appendleft(sequence)

    def _can_admit(self, sequence: Sequence) -> bool:
        if len(self._running) >= self._max_num_seqs or (self._running and not self.cache.num_free_blocks):
            return False
        known = sequence.token_ids[: sequence.num_tokens]
        return self.cache.can_admit(sequence.table, known, reserve=len(self._running))

    def _admit(self, sequence: Sequence) -> bool:
        if len(self._running) >= self._max_num_seqs:
            return False
        known = sequence.token_ids[: sequence.num_tokens]
        num_cached = self.cache.admit(sequence.table, known, reserve=len(self._running))
        if num_cached is None:
            return False
        self._waiting.popleft()
        sequence.num_computed_tokens = num_cached
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = min(num_cached, sequence.num_prompt_tokens)
        self._running.append(sequence)
        return True


class _PrefillBudget:
    """What one step may spend on prompts: tokens, and their cost, in tokens of no context. A token far into a long
    prompt costs more, by its attention: where decodes wait for the step it counts for more, so that the step's time
    stays what the allowance says (`pace.py`; by arithmetic until that has been learned, as on a CPU), and where
    attention is most of the cost a chunk ends with a block: attention's tiles hold as many tokens or a part of them, so
    98 would take the time of 112. A long prompt leaves half to the others, so that nobody waits for its end. Tokens are
    shared by all replicas, who share the experts; cost is this one's, whose attention runs beside that of others.
    Idea: Sarathi-Serve's bounded chunks, by cost."""

    def __init__(self, num_tokens: int, allowance: Allowance, block_size: int) -> None:
        self._tokens, self._cost = num_tokens, allowance.cost
        self._whole, self._allowance, self._block_size = num_tokens, allowance, block_size

    @property
    def is_spent(self) -> bool:
        return self._tokens < 1 or self._cost < 1

    def take(self, sequence: Sequence, *, alone: bool) -> int:
        """Tokens of this sequence that run in the step; at least one where a token of the budget is left."""
        if self.is_spent:
            return 0
        tokens, cost, context = self._tokens, self._cost, sequence.num_computed_tokens
        if not alone and sequence.num_pending_tokens > _LONG_PROMPT * self._whole:
            tokens, cost = max(1, tokens // 2), max(1.0, cost / 2)
        count = min(max(1, self._allowance.num_tokens(context, cost)), tokens, sequence.num_pending_tokens)
        self._cost -= self._allowance.cost_of(context, count)
        mostly_attention = 0 < self._allowance.parity <= context
        if mostly_attention and self._block_size < count < sequence.num_pending_tokens:
            count -= (context + count) % self._block_size
        self._tokens -= count
        return count
