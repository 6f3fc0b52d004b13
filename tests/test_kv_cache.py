"""KV blocks: whatever is done to them, in any order, the books balance and a shared prefix is a true prefix."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expertmesh.cluster.attention.kv_cache import BlockTable, KVCache

BLOCK = 4
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=40)


def tokens(*values) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def written(cache: KVCache, text: np.ndarray, salt: bytes = b"") -> BlockTable:
    """A sequence that was admitted and computed whole."""
    table = BlockTable(salt=salt)
    assert cache.admit(table, text) is not None
    cache.name_computed(table, text, len(text))
    return table


class Blocks(RuleBasedStateMachine):
    """Sequences come, grow, are computed and leave; `content` is what a real pool would hold in each block."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(12, BLOCK)
        self.live: list[dict] = []
        self.content: dict[int, tuple] = {}

    def sequence(self, data) -> dict:
        return data.draw(st.sampled_from(self.live))

    @rule(text=TEXTS, salt=st.sampled_from([b"", b"k"]), reserve=st.integers(0, 3))
    def admit(self, text, salt, reserve) -> None:
        table, ids = BlockTable(salt=salt), tokens(*text)
        free = self.cache.num_free_blocks
        could = self.cache.can_admit(table, ids, reserve=reserve)
        cached = self.cache.admit(table, ids, reserve=reserve)
        assert (cached is not None) == could
        if cached is None:
            assert self.cache.num_free_blocks == free
            assert table.num_blocks == 0
            return
        assert cached % BLOCK == 0
        assert cached < len(text)
        assert self.cache.num_free_blocks >= reserve
        for index in range(cached // BLOCK):
            block = int(table.block_ids[index])
            assert self.content[block] == (salt, tuple(text[: (index + 1) * BLOCK])), (
                "a cached block holds another prefix"
            )
        self.live.append({"table": table, "text": text, "computed": cached, "salt": salt})

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(1, 9))
    def compute(self, data, count) -> None:
        sequence = self.sequence(data)
        text, table = sequence["text"], sequence["table"]
        sequence["computed"] = min(len(text), sequence["computed"] + count)
        for index in range(sequence["computed"] // BLOCK):
            self.content[int(table.block_ids[index])] = (sequence["salt"], tuple(text[: (index + 1) * BLOCK]))
        self.cache.name_computed(table, tokens(*text), sequence["computed"])

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def grow(self, data, more) -> None:
        sequence = self.sequence(data)
        held, free = sequence["table"].num_blocks, self.cache.num_free_blocks
        if self.cache.grow(sequence["table"], len(sequence["text"]) + len(more)):
            sequence["text"] = sequence["text"] + more
        else:
            assert (sequence["table"].num_blocks, self.cache.num_free_blocks) == (held, free)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data) -> None:
        sequence = self.sequence(data)
        self.live.remove(sequence)
        self.cache.release(sequence["table"])

    @invariant()
    def books_balance(self) -> None:
        self.cache.check_integrity(s["table"] for s in self.live)
        for s in self.live:
            assert s["table"].num_blocks >= self.cache.blocks_for(s["computed"])

    def teardown(self) -> None:
        for s in self.live:
            self.cache.release(s["table"])
        self.cache.check_integrity([])
        assert self.cache.num_free_blocks == self.cache.num_blocks


Blocks.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
TestBlocks = Blocks.TestCase


def test_whole_prompt_in_cache_leaves_a_token_to_compute():
    cache = KVCache(8, BLOCK)
    text = tokens(*range(8))
    cache.release(written(cache, text))
    assert cache.admit(BlockTable(), text) == 4
    assert cache.admit(BlockTable(), tokens(*range(9))) == 8


def test_generated_tokens_are_found_by_the_next_turn():
    cache = KVCache(8, BLOCK)
    text = np.arange(14)
    table = BlockTable()
    assert cache.admit(table, text[:5]) == 0
    cache.name_computed(table, text[:5], 5)
    for length in range(6, 15):
        assert cache.grow(table, length)
        cache.name_computed(table, text[:length], length - 1)
    cache.release(table)
    assert cache.admit(BlockTable(), np.arange(20)) == 12


def test_block_is_shared_only_once_written():
    cache = KVCache(8, BLOCK)
    text = np.arange(12)
    first = BlockTable()
    cache.admit(first, text)
    assert cache.find_prefix(BlockTable(), text) == []
    cache.name_computed(first, text, 7)
    assert len(cache.find_prefix(BlockTable(), text)) == 1


def test_salts_do_not_share():
    cache = KVCache(8, BLOCK)
    text = np.arange(9)
    cache.release(written(cache, text, salt=b"alice"))
    assert cache.find_prefix(BlockTable(salt=b"bob"), text) == []
    assert len(cache.find_prefix(BlockTable(salt=b"alice"), text)) == 2


def test_equal_block_behind_another_prefix_is_not_shared():
    cache = KVCache(8, BLOCK)
    cache.release(written(cache, tokens(1, 1, 1, 1, 2, 2, 2, 2, 0)))
    assert cache.find_prefix(BlockTable(), tokens(3, 3, 3, 3, 2, 2, 2, 2, 0)) == []


def test_least_recently_used_goes_first_and_a_chain_from_its_tail():
    cache = KVCache(4, BLOCK)
    old, new = np.arange(8), np.arange(100, 108)
    cache.release(written(cache, old))
    cache.release(written(cache, new))
    taken = BlockTable()
    assert cache.admit(taken, np.arange(200, 204)) == 0
    assert len(cache.find_prefix(BlockTable(), np.arange(9))) == 1, "the head of the older chain survives"
    assert len(cache.find_prefix(BlockTable(), np.arange(100, 109))) == 2
    touched = BlockTable()
    assert cache.admit(touched, np.arange(5), reserve=0) == 4  # uses the old chain's head again
    cache.release(touched)
    other = BlockTable()
    assert cache.admit(other, np.arange(300, 308)) == 0
    assert len(cache.find_prefix(BlockTable(), np.arange(9))) == 1
    assert cache.find_prefix(BlockTable(), np.arange(100, 109)) == []


def test_shared_blocks_outlive_their_writer():
    cache = KVCache(4, BLOCK)
    text = np.arange(9)
    writer = written(cache, text)
    reader = BlockTable()
    assert cache.admit(reader, np.arange(10)) == 8
    cache.release(writer)
    assert cache.num_free_blocks == 1
    cache.check_integrity([reader])
    cache.release(reader)
    assert cache.num_free_blocks == 4


def test_cached_blocks_count_once_when_they_are_woken():
    cache = KVCache(3, BLOCK)
    cache.release(written(cache, np.arange(12)))
    assert cache.num_free_blocks == 3
    assert not cache.can_admit(BlockTable(), np.arange(16)), "needs 4 blocks, 2 of them the cached ones"
    assert cache.admit(BlockTable(), np.arange(12), reserve=1) is None
    assert cache.admit(BlockTable(), np.arange(12)) == 8


@pytest.mark.parametrize("length", [1, 4, 5])
def test_prefix_cache_can_be_off(length):
    cache = KVCache(8, BLOCK, enable_prefix_cache=False)
    cache.release(written(cache, np.arange(length)))
    assert cache.admit(BlockTable(), np.arange(length)) == 0
    assert cache.num_named_blocks == 0
