"""The expert tables of all layers at once, with everything a search asks of them: forced placement, lost copies, books.
Pure NumPy, deterministic (the first best wins). Arrays over experts have one more column, which stands for "no expert"
(-1), so that empty slots need no branch."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

NEVER = -np.inf
RESTORED = 1e6  # x all load of a layer: what one more copy is worth
PARTED = 0.01  # x mean load of a rank: what it is worth that copies leave their common host


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one layer, and where the layer stands after it. The first has no edits: the valid start."""

    edits: tuple[tuple[int, int, int], ...]  # (rank, slot, logical), in order
    num_moves: int  # of the layer since the start
    max_load: float
    worth: float = 0.0  # beside the fall of max_load, in its unit: for redundancy, which is not speed


class ExpertTables:
    """`table` [num_layers, ep_size, slots] int32, -1 = empty. The last column of arrays over experts stands for -1."""

    def __init__(
        self,
        loads: FloatArray,  # [num_layers, num_logical]
        kept: Int32Array,  # [num_layers, ep_size, any width] what each rank holds already
        slots: int,
        hosts: IntArray,  # [ep_size]
        *,
        num_copies: int,  # a layer
        min_copies: int,  # of an expert, where they fit
    ) -> None:
        self._num_layers, self._num_logical = loads.shape
        self._ep_size, self._slots, self._hosts = kept.shape[1], slots, hosts
        self._num_hosts = int(hosts.max()) + 1 if len(hosts) else 0
        # With one rank a host, or one host, distinct ranks already say all that can be said about hosts.
        self._watch_hosts = 1 < self._num_hosts < self._ep_size
        self._num_copies, self._min_copies = num_copies, max(1, min_copies)
        self._loads = np.pad(loads, ((0, 0), (0, 1)))
        shape = (self._num_layers, self._ep_size, self._num_logical + 1)
        self._kept = kept
        self._held_before: BoolArray = np.zeros(shape, dtype=bool)
        self._held_before[..., -1] = True
        self.table: Int32Array = np.full((self._num_layers, self._ep_size, slots), -1, dtype=np.int32)
        self._holds: BoolArray = np.zeros(shape, dtype=bool)
        self._counts: IntArray = np.zeros((self._num_layers, self._num_logical + 1), dtype=np.int64)
        self._share = self._loads.copy()  # load of one copy
        self._host_copies = np.zeros((self._num_layers, self._num_hosts, self._num_logical + 1), dtype=np.int64)
        self._rank_loads = np.zeros((self._num_layers, self._ep_size))
        self.num_moves: IntArray = np.zeros(self._num_layers, dtype=np.int64)
        self.history: list[list[Step]] = []  # of each layer, from make_valid on
        self._take_over(kept)

    def forget_moves(self) -> None:
        """Count no moves: the start is as arbitrary as any other."""
        self._held_before[:] = True

    # ------------------------------------------------------------ validity

    def _take_over(self, kept: Int32Array) -> None:
        """Keep what each rank holds: a slot within the width stays, the rest goes to free slots, as far as they go."""
        layers, ranks, columns = (kept >= 0).nonzero()
        self._held_before[layers, ranks, kept[layers, ranks, columns]] = True
        width = min(kept.shape[2], self._slots)
        start = kept[:, :, :width]
        self._write_all(start)
        if kept.shape[2] <= self._slots:
            return
        # Too wide: the hottest copies of the rest take what is free; then rarer experts push surplus copies out.
        for layer, rank in zip(*np.nonzero((kept[:, :, width:] >= 0).any(axis=2)), strict=True):
            rest = [int(e) for e in kept[layer, rank, width:] if e >= 0]
            for logical in sorted(rest, key=lambda e: (self._counts[layer, e] > 0, -self._loads[layer, e], e)):
                if self._holds[layer, rank, logical]:
                    continue
                row = self.table[layer, rank]
                spare = [s for s in range(self._slots) if row[s] < 0]
                if not spare and self._counts[layer, logical] == 0:
                    surplus = [s for s in range(self._slots) if self._counts[layer, row[s]] > 1]
                    spare = sorted(surplus, key=lambda s: (self._loads[layer, row[s]], s))[:1]
                if spare:
                    one = np.asarray([layer])
                    self._set(one, np.asarray([rank]), np.asarray([spare[0]]), np.asarray([logical]))

    def _write_all(self, start: Int32Array) -> None:
        """Write a table whole; a second copy on the same rank is left out."""
        for column in range(start.shape[2]):
            layers, ranks = (start[:, :, column] >= 0).nonzero()
            logical = start[layers, ranks, column]
            fresh = ~self._holds[layers, ranks, logical]
            layers, ranks, logical = layers[fresh], ranks[fresh], logical[fresh]
            self.table[layers, ranks, column] = logical
            self._holds[layers, ranks, logical] = True
        self._counts[:, :-1] = self._holds[:, :, :-1].sum(axis=1)
        for rank, host in enumerate(self._hosts):
            self._host_copies[:, host, :-1] += self._holds[:, rank, :-1]
        self._share[:] = self._loads / np.maximum(self._counts, 1)
        self._sum_ranks(np.arange(self._num_layers))

    def make_valid(self) -> None:
        """Place every expert that has no copy, hottest first on the coldest rank; then keep to the number of copies."""
        while len(layers := rows_where((self._counts[:, :-1] == 0).any(axis=1))):
            missing = np.where(self._counts[layers, :-1] == 0, self._loads[layers, :-1], NEVER)
            self._add(layers, missing.argmax(axis=1), evict_above=1, restores=False)
        while len(layers := rows_where(self._counts[:, :-1].sum(axis=1) > self._num_copies)):
            self._drop_one(layers)
        peaks = self._rank_loads.max(axis=1).tolist()
        self.history = [[Step((), moves, peak)] for moves, peak in zip(self.num_moves.tolist(), peaks)]

    def _drop_one(self, layers: IntArray) -> None:
        """Free the slot whose loss lifts the other copies least; where an expert has too many copies, of that one."""
        counts = self._counts[layers]
        after = self._loads[layers] / np.maximum(counts - 1, 1)
        after = np.where(counts > 1, after + np.where(counts > self._min_copies, 0.0, 1e300), np.inf)
        logical = after[:, :-1].argmin(axis=1)
        ranks = np.where(self._holds[layers, :, logical], self._rank_loads[layers], NEVER)
        if self._watch_hosts:  # rather a copy whose host has another
            copies = self._host_copies[layers[:, None], self._hosts[None], logical[:, None]]
            ranks = ranks + np.where(copies > 1, 1e300, 0.0)
        rank = ranks.argmax(axis=1)
        slot = (self.table[layers, rank] == logical[:, None]).argmax(axis=1)
        self._set(layers, rank, slot, np.full(len(layers), -1))

    # ------------------------------------------------------------ redundancy

    def restore_copies(self) -> None:
        """Bring every expert to `min_copies` and the layer to `num_copies`."""
        while len(layers := rows_where((self._counts[:, :-1] < self._min_copies).any(axis=1))):
            rare = np.where(self._counts[layers, :-1] < self._min_copies, self._loads[layers, :-1], NEVER)
            if not self._add(layers, rare.argmax(axis=1), evict_above=self._min_copies, restores=True):
                break
        while len(layers := rows_where(self._counts[:, :-1].sum(axis=1) < self._num_copies)):
            free = np.asarray(self._free(layers).any(axis=2))
            room = np.asarray((free[:, :, None] & ~self._holds[layers, :, :-1]).any(axis=1))
            hot = np.where(room, self._share[layers, :-1], NEVER)
            layers, hot = layers[room.any(axis=1)], hot[room.any(axis=1)]
            if not len(layers) or not self._add(layers, hot.argmax(axis=1), evict_above=0, restores=True):
                break

    def _add(self, layers: IntArray, logical: IntArray, *, evict_above: int, restores: bool) -> bool:
        """One more copy of `logical` [len(layers)], on the coldest rank with a free slot; another host first if all its
        copies are on one. Without a free slot, in place of an expert of more than `evict_above` copies (0: never).
        True if any layer could."""
        free = self._free(layers)
        can: BoolArray = ~self._holds[layers, :, logical] & free.any(axis=2)
        key = self._rank_loads[layers].copy()
        if self._watch_hosts:
            there = self._host_copies[layers[:, None], self._hosts[None], logical[:, None]] > 0
            key += np.where(there & self._on_one_host(layers, logical)[:, None], 1e200, 0.0)
        rank = np.where(can, key, np.inf).argmin(axis=1)
        slot = free[np.arange(len(layers)), rank].argmax(axis=1)
        stuck: BoolArray = np.asarray(~can.any(axis=1), dtype=np.bool_)
        if stuck.any() and evict_above:
            full = layers[stuck]
            count = self._counts[full[:, None, None], self.table[full]]
            spare = (count > evict_above) & ~self._holds[full, :, logical[stuck]][:, :, None] & (self.table[full] >= 0)
            cost = np.where(
                spare, self._loads[full[:, None, None], self.table[full]] / np.maximum(count - 1, 1), np.inf
            )
            best = cost.reshape(len(full), -1).argmin(axis=1)
            rank[stuck], slot[stuck] = best // self._slots, best % self._slots
            stuck[stuck] = ~spare.reshape(len(full), -1).any(axis=1)
        for i in rows_where(stuck) if restores else ():
            stuck[i] = not self._relay(int(layers[i]), int(logical[i]))
            rank[i] = -1  # done, or impossible
        done = ~stuck & (rank >= 0)
        assert restores or done.all(), "capacity() lets one copy of every expert fit"
        self._set(layers[done], rank[done], slot[done], logical[done])
        if restores:
            self._note(layers[done], [(rank[done], slot[done], logical[done])], self._restored(layers[done]))
        return not stuck.all()

    def _relay(self, layer: int, logical: int) -> bool:
        """Only ranks that hold `logical` have room: the lightest expert that fits there makes room on another rank."""
        table, holds = self.table[layer], self._holds[layer]
        best: tuple[float, int, int, int, int] | None = None
        for full, free in ((c, r) for c in range(self._ep_size) for r in range(self._ep_size)):
            if holds[full, logical] or (table[free] >= 0).all():
                continue
            for slot, third in enumerate(table[full].tolist()):
                if third >= 0 and not holds[free, third]:
                    found = (float(self._share[layer, third]), full, slot, free, third)
                    best = found if best is None else min(best, found)
        if best is None:
            return False
        _, full, slot, free, third = best
        one = np.asarray([layer])
        edits = [(free, int((table[free] < 0).argmax()), third), (full, slot, logical)]
        made = [(np.asarray([r]), np.asarray([s]), np.asarray([expert])) for r, s, expert in edits]
        for rank, place, expert in made:
            self._set(one, rank, place, expert)
        self._note(one, made, self._restored(one))
        return True

    def _free(self, layers: IntArray) -> BoolArray:
        """[n, ep_size, slots] the empty slots."""
        return np.asarray(self.table[layers] < 0, dtype=np.bool_)

    def _on_one_host(self, layers: IntArray, logical: IntArray) -> BoolArray:
        spread: IntArray = (self._host_copies[layers, :, logical] > 0).sum(axis=1)
        alone: BoolArray = spread == 1
        return alone

    def part_hosts(self) -> None:
        """Swap a copy of every expert whose copies share one host with the expert of another host nearest in load."""
        if not self._watch_hosts:
            return
        worth = PARTED * self._rank_loads.mean(axis=1)
        given_up = np.zeros((self._num_layers, self._num_logical), dtype=bool)
        while True:
            spread = (self._host_copies[:, :, :-1] > 0).sum(axis=1)
            together = (self._counts[:, :-1] > 1) & (spread == 1) & ~given_up
            layers = rows_where(together.any(axis=1))
            if not len(layers):
                return
            logical = np.where(together[layers], self._loads[layers, :-1], NEVER).argmax(axis=1)
            n = np.arange(len(layers))
            source = self._holds[layers, :, logical].argmax(axis=1)
            source_slot = (self.table[layers, source] == logical[:, None]).argmax(axis=1)
            table = self.table[layers]
            others = (self._hosts[None] != self._hosts[source][:, None])[:, :, None]
            fits = others & ~self._holds[layers, source][n[:, None, None], table]
            for_swap = self._host_copies[layers[:, None], self._hosts[None]]  # [n, ep_size, num_logical + 1]
            alone = np.take_along_axis(for_swap, table % (self._num_logical + 1), axis=2) == 1
            splits = alone & (self._counts[layers[:, None, None], table] > 1)
            there = self._host_copies[layers, self._hosts[source]][n[:, None, None], table] > 0
            distance = np.abs(self._share[layers[:, None, None], table] - self._share[layers, logical][:, None, None])
            distance = np.where(fits & ~(splits & there), distance, np.inf).reshape(len(layers), -1)
            best = distance.argmin(axis=1)
            ok = np.isfinite(distance[n, best])
            given_up[layers[~ok], logical[~ok]] = True
            layers, source, source_slot, logical = layers[ok], source[ok], source_slot[ok], logical[ok]
            rank, slot = best[ok] // self._slots, best[ok] % self._slots
            other = self.table[layers, rank, slot].astype(np.int64)
            self._set(layers, source, source_slot, other)
            self._set(layers, rank, slot, logical)
            self._note(layers, [(source, source_slot, other), (rank, slot, logical)], worth[layers])

    def _spread(self, at: IntArray, logical: IntArray) -> IntArray:
        """Hosts that hold `logical` [n, slots]."""
        copies = self._host_copies[at[:, :, None], np.arange(self._num_hosts), logical[:, :, None]]
        spread: IntArray = (copies > 0).sum(axis=2)
        return spread

    def _still_apart(self, at: IntArray, logical: IntArray, source: IntArray, target: IntArray) -> BoolArray:
        """A move from `source` to `target` leaves the copies on as many hosts as before, or on two."""
        spread = self._spread(at, logical)
        same = self._hosts[source] == self._hosts[target]
        leaves = self._host_copies[at, self._hosts[source], logical] == 1
        arrives = self._host_copies[at, self._hosts[target], logical] == 0
        after = spread - leaves + arrives
        apart: BoolArray = same | (after >= np.minimum(spread, 2)) | (logical < 0)
        return apart

    # ------------------------------------------------------------ the books

    def _set(self, layers: IntArray, ranks: IntArray, slots: IntArray, logical: IntArray) -> None:
        """table[layers, ranks, slots] = logical, with every derived array. Layers are distinct."""
        old = self.table[layers, ranks, slots].astype(np.int64)
        self.num_moves[layers] -= ~self._held_before[layers, ranks, old]
        self.num_moves[layers] += ~self._held_before[layers, ranks, logical]
        self.table[layers, ranks, slots] = logical
        hosts = self._hosts[ranks]
        for expert, change in ((old, -1), (logical, 1)):
            self._holds[layers, ranks, expert] = change > 0
            self._counts[layers, expert] += change
            self._host_copies[layers, hosts, expert] += change
            self._holds[layers, :, -1] = False  # "-1" is never held, never counted
            self._counts[layers, -1] = 0
            self._host_copies[layers, :, -1] = 0
            self._share[layers, expert] = self._loads[layers, expert] / np.maximum(self._counts[layers, expert], 1)
        self._sum_ranks(layers)

    def _sum_ranks(self, layers: IntArray) -> None:
        self._rank_loads[layers] = self._share[layers[:, None, None], self.table[layers]].sum(axis=2)

    def _restored(self, layers: IntArray) -> FloatArray:
        """What a copy brought back is worth: before any speed."""
        worth: FloatArray = RESTORED * (1.0 + self._loads[layers].sum(axis=1))
        return worth

    def _note(
        self, layers: IntArray, edits: list[tuple[IntArray, IntArray, IntArray]], worth: FloatArray | None = None
    ) -> None:
        peaks, moves = self._rank_loads[layers].max(axis=1).tolist(), self.num_moves[layers].tolist()
        worths = [0.0] * len(layers) if worth is None else worth.tolist()
        columns = [[array.tolist() for array in edit] for edit in edits]
        for i, layer in enumerate(layers.tolist()):
            changed = tuple((ranks[i], slots[i], logical[i]) for ranks, slots, logical in columns)
            self.history[layer].append(Step(changed, moves[i], peaks[i], worths[i]))


def rows_where(mask: npt.ArrayLike) -> IntArray:
    """[k] indices of the true entries of a vector."""
    rows: IntArray = np.asarray(mask).nonzero()[0]
    return rows
