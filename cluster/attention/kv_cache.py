"""KV blocks: allocate, share prefixes, free. Pure bookkeeping; the tensors belong to `runner.py`.

Why hash-chained blocks: a full block's content is named by a digest over its parent's digest and its own token ids, so
a chain of equal names is an equal prefix, whichever request wrote it. Blocks of generated tokens are named in the same
way, so the next turn of a conversation finds the last turn's prompt and output. A block gets its name only once its KV
is written. Named blocks that nobody uses stay until their space is needed and go least recently used first, the tail of
a chain before its head. The salt of a request is part of its chain's root: prefixes are shared within a salt only.
Idea: vLLM's automatic prefix caching."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one sequence, in order."""

    salt: bytes = b""
    block_ids: np.ndarray = field(default_factory=lambda: np.full(8, -1, dtype=np.int32))  # [capacity] int32, -1 padded
    num_blocks: int = 0
    digests: list[bytes] = field(default_factory=list)  # names of the full blocks of known tokens, as far as computed
    num_named_blocks: int = 0  # leading blocks whose names are settled: taken from the cache or offered to it

    def ids(self) -> np.ndarray:
        return self.block_ids[: self.num_blocks]


class KVCache:
    """Owner of all blocks. Nothing is ever allocated by half."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self._num_users = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # free and unnamed; a stack
        self._idle: OrderedDict[int, None] = OrderedDict()  # free and named; first = least recently used
        self._block_of: dict[bytes, int] = {}
        self._digest_of: list[bytes | None] = [None] * num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks without a user: what can be allocated."""
        return len(self._blank) + len(self._idle)

    @property
    def num_named_blocks(self) -> int:
        return len(self._block_of)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, table: BlockTable, token_ids: np.ndarray) -> list[int]:
        """Blocks of the longest cached prefix of known `token_ids`; at least one token is left to compute."""
        if not self.enable_prefix_cache:
            return []
        limit = (len(token_ids) - 1) // self.block_size
        found: list[int] = []
        for index in range(limit):
            self._extend_digests(table, token_ids, index + 1)
            block_id = self._block_of.get(table.digests[index])
            if block_id is None:
                break
            found.append(block_id)
        return found

    def can_admit(self, table: BlockTable, token_ids: np.ndarray, *, reserve: int = 0) -> bool:
        return self._plan(table, token_ids, reserve) is not None

    def admit(self, table: BlockTable, token_ids: np.ndarray, *, reserve: int = 0) -> int | None:
        """Give an empty table blocks for all of `token_ids`, cached ones first, leaving `reserve` blocks free.

        Returns the number of tokens found in the cache, or None where the blocks are not there (nothing is taken)."""
        assert table.num_blocks == 0
        prefix = self._plan(table, token_ids, reserve)
        if prefix is None:
            return None
        for block_id in prefix:
            if self._num_users[block_id] == 0:
                del self._idle[block_id]
            self._num_users[block_id] += 1
        self._put(table, prefix)
        table.num_named_blocks = len(prefix)
        self._take(table, self.blocks_for(len(token_ids)) - len(prefix))
        return len(prefix) * self.block_size

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Make the table cover `num_tokens` tokens; False where blocks are missing (nothing is taken)."""
        missing = self.blocks_for(num_tokens) - table.num_blocks
        if missing > self.num_free_blocks:
            return False
        if missing > 0:
            self._take(table, missing)
        return True

    def name_computed(self, table: BlockTable, token_ids: np.ndarray, num_computed_tokens: int) -> None:
        """Offer the blocks that are now full and written to later requests. Call only after the step succeeded."""
        num_full = num_computed_tokens // self.block_size
        if num_full <= table.num_named_blocks or not self.enable_prefix_cache:
            return
        self._extend_digests(table, token_ids, num_full)
        for index in range(table.num_named_blocks, num_full):
            block_id, digest = int(table.block_ids[index]), table.digests[index]
            if digest not in self._block_of:  # else an equal block has the name and this one stays blank
                self._block_of[digest] = block_id
                self._digest_of[block_id] = digest
        table.num_named_blocks = num_full

    def release(self, table: BlockTable) -> None:
        """Give all blocks back; the table is empty afterwards and may be admitted again."""
        for block_id in reversed(table.ids().tolist()):  # tail first, so that a chain is evicted from its end
            self._num_users[block_id] -= 1
            if self._num_users[block_id] == 0:
                if self._digest_of[block_id] is None:
                    self._blank.append(block_id)
                else:
                    self._idle[block_id] = None
        table.block_ids[: table.num_blocks] = -1
        table.num_blocks = 0
        table.num_named_blocks = 0

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Assert that the books balance, given every table in use."""
        users = [0] * self.num_blocks
        for table in tables:
            ids = table.ids().tolist()
            assert len(set(ids)) == len(ids), "a table holds a block twice"
            assert all(0 <= b < self.num_blocks for b in ids)
            assert (table.block_ids[table.num_blocks :] == -1).all()
            for block_id in ids:
                users[block_id] += 1
        assert users == self._num_users, "user counts differ from the tables"
        free = [*self._blank, *self._idle]
        assert len(set(free)) == len(free), "a block is free twice"
        assert set(free) == {b for b, n in enumerate(users) if n == 0}, "a block is lost, or both free and used"
        assert all(self._digest_of[b] is None for b in self._blank)
        assert all(self._digest_of[b] is not None for b in self._idle)
        assert {d: b for b, d in enumerate(self._digest_of) if d is not None} == self._block_of, "names differ"

    def _plan(self, table: BlockTable, token_ids: np.ndarray, reserve: int) -> list[int] | None:
        """The cached prefix to use if all of `token_ids` fits, else None."""
        num_blocks = self.blocks_for(len(token_ids))
        if num_blocks > self.num_blocks:
            return None
        prefix = self.find_prefix(table, token_ids)
        num_woken = sum(1 for block_id in prefix if self._num_users[block_id] == 0)
        fits = num_blocks - len(prefix) + reserve <= self.num_free_blocks - num_woken
        return prefix if fits else None

    def _take(self, table: BlockTable, count: int) -> None:
        taken = [self._pop_free() for _ in range(count)]
        for block_id in taken:
            self._num_users[block_id] = 1
        self._put(table, taken)

    def _pop_free(self) -> int:
        if self._blank:
            return self._blank.pop()
        block_id, _ = self._idle.popitem(last=False)
        digest = self._digest_of[block_id]
        assert digest is not None
        del self._block_of[digest]
        self._digest_of[block_id] = None
        return block_id

    def _put(self, table: BlockTable, block_ids: list[int]) -> None:
        end = table.num_blocks + len(block_ids)
        if end > len(table.block_ids):
            grown = np.full(max(end, 2 * len(table.block_ids)), -1, dtype=np.int32)
            grown[: table.num_blocks] = table.ids()
            table.block_ids = grown
        table.block_ids[table.num_blocks : end] = block_ids
        table.num_blocks = end

    def _extend_digests(self, table: BlockTable, token_ids: np.ndarray, num_blocks: int) -> None:
        digests, size = table.digests, self.block_size
        while len(digests) < num_blocks:
            start = len(digests) * size
            parent = digests[-1] if digests else hashlib.blake2b(table.salt, digest_size=16, person=b"kv root").digest()
            block = np.ascontiguousarray(token_ids[start : start + size], dtype=np.int64)
            digests.append(hashlib.blake2b(parent + block.tobytes(), digest_size=16, person=b"kv block").digest())
