"""Local search over expert tables: steps that cool the hottest rank of every layer, all layers at once. Pure NumPy.

A step acts between a layer's hottest rank and a colder one, and is one of
- swap: an expert of the hot rank changes places with a lighter one (or with an empty slot) of the cold rank,
- replicate: an expert of the hot rank gets a copy on the cold rank, in an empty slot or in place of a surplus copy.
The step with the largest fall of the pair's maximum per move is taken. Every step lowers the hottest rank's load and
lifts no rank up to it, so the sorted loads fall and the search ends. `history` keeps the steps of each layer, so that a
bounded plan can take a prefix of each (`choose_steps`)."""

import heapq

import numpy as np

from .eplb_tables import NEVER, BoolArray, ExpertTables, FloatArray, Int32Array, IntArray, Step, rows_where


class Search(ExpertTables):
    """Tables, and the way from them to balanced ones."""

    def balance(self, *, tolerance: float, min_gain: float) -> None:
        """Step by step until every layer is within `tolerance` or has no step left that gains `min_gain`."""
        partner = np.ones(self._num_layers, dtype=np.int64)  # 1 = the coldest rank, 2 = the next ...
        kicks = np.full(self._num_layers, 2 * (self._num_copies - self._num_logical) + self._ep_size)
        mean = self._rank_loads.mean(axis=1)
        target, least = mean * (1 + tolerance), np.maximum(mean * min_gain, 1e-12 * self._rank_loads.sum(axis=1))
        while True:
            active = (partner < self._ep_size) & (self._rank_loads.max(axis=1) > target)
            layers = rows_where(active)
            if not len(layers):
                return
            order = np.argsort(self._rank_loads[layers], axis=1, kind="stable")
            cold, hot = order[np.arange(len(layers)), partner[layers] - 1], order[:, -1]
            stepped = self._step(layers, hot, cold, least[layers])
            partner[layers] = np.where(stepped, 1, partner[layers] + 1)
            stuck = layers[partner[layers] >= self._ep_size]
            stuck = stuck[(kicks[stuck] > 0) & (self._rank_loads[stuck].max(axis=1) > mean[stuck] * 1.002)]
            if len(stuck):
                kicks[stuck] -= 1
                partner[stuck[self._kick(stuck)]] = 1

    def _step(self, layers: IntArray, hot: IntArray, cold: IntArray, least: FloatArray) -> BoolArray:
        """Take the best step between these ranks of each layer; [len(layers)] whether there was one."""
        given, taken = self.table[layers, hot].astype(np.int64), self.table[layers, cold].astype(np.int64)
        swap, swap_cost = self._swaps(layers, hot, cold, given, taken)
        copy, copy_cost = self._replications(layers, hot, cold, given, taken)
        fall = np.stack((swap, copy), axis=1).reshape(len(layers), -1)  # [n, 2 * slots * slots]
        cost = np.stack((swap_cost, copy_cost), axis=1).reshape(len(layers), -1)
        value = np.where(fall > least[:, None], fall / np.maximum(cost, 0.25), NEVER)
        best = value.argmax(axis=1)
        stepped: BoolArray = value[np.arange(len(layers)), best] > NEVER
        pairs = self._slots * self._slots
        for is_copy in (False, True):
            chosen = stepped & ((best >= pairs) == is_copy)
            if not chosen.any():
                continue
            at, pair = layers[chosen], best[chosen] % pairs
            s, t = pair // self._slots, pair % self._slots
            out, back = given[chosen, s], taken[chosen, t]
            edits = [(cold[chosen], t, out)] if is_copy else [(hot[chosen], s, back), (cold[chosen], t, out)]
            for rank, slot, logical in edits:
                self._set(at, rank, slot, logical)
            self._note(at, edits)
        return stepped

    def _kick(self, layers: IntArray) -> BoolArray:
        """Where no step helps: the least useful surplus copy becomes one more copy of the hot rank's heaviest expert.
        If only ranks that hold it have that slot, a third expert makes room on a cold rank and goes there.

        The peak may rise for a while, but copies become finer, so that steps fit again. [len(layers)] what was done."""
        at, n = layers[:, None], np.arange(len(layers))
        counts, loads = self._counts[layers, :-1], self._rank_loads[layers]
        more = self._holds[layers, loads.argmax(axis=1)][:, :-1] & (counts < self._ep_size)
        wanted = np.where(more, self._share[layers, :-1], NEVER).argmax(axis=1)
        fewer = counts > self._min_copies
        fewer[n, wanted] = False
        after = np.where(fewer, self._loads[layers, :-1] / np.maximum(counts - 1, 1), np.inf)
        surplus = after.argmin(axis=1)
        useful = more.any(axis=1) & (after[n, surplus] < self._share[layers, wanted] * (1 - 1e-9))
        leave, enter = self._holds[layers, :, surplus], ~self._holds[layers, :, wanted]  # [n, ep_size]
        if self._watch_hosts:
            gone = self._host_copies[at, self._hosts[None], surplus[:, None]] == 1
            new = self._host_copies[at, self._hosts[None], wanted[:, None]] == 0
            left = np.minimum(2, counts[n, surplus] - 1)[:, None]
            leave &= self._spread(at, surplus[:, None]) - gone >= left
            enter &= self._spread(at, wanted[:, None]) + new >= 2
        leave, enter = leave & useful[:, None], enter & useful[:, None]
        direct = (leave & enter).any(axis=1)
        rank = np.where(np.where(direct[:, None], leave & enter, leave), loads, np.inf).argmin(axis=1)
        slot = (self.table[layers, rank] == surplus[:, None]).argmax(axis=1)
        cold = np.where(enter, loads, np.inf).argmin(axis=1)
        third = self.table[layers, cold].astype(np.int64)  # [n, slots]
        share = self._loads[layers, wanted] / (counts[n, wanted] + 1)
        fits = loads[n, cold] + share - loads.mean(axis=1)  # the load that would have to leave the cold rank
        distance = np.abs(self._share[at, third] - fits[:, None])
        may_go = (third >= 0) & ~self._holds[at, rank[:, None], third]
        if self._watch_hosts:
            may_go &= self._still_apart(at, third, cold[:, None], rank[:, None])
        way = np.where(may_go, distance, np.inf).argmin(axis=1)
        relayed = ~direct & leave.any(axis=1) & enter.any(axis=1) & may_go.any(axis=1)
        for chosen, edits in (
            (direct, [(rank, slot, wanted)]),
            (relayed, [(rank, slot, third[n, way]), (cold, way, wanted)]),
        ):
            made = [(r[chosen], s[chosen], logical[chosen]) for r, s, logical in edits]
            for rank_, slot_, logical_ in made:
                self._set(layers[chosen], rank_, slot_, logical_)
            self._note(layers[chosen], made)
        done: BoolArray = direct | relayed
        return done

    def _swaps(
        self, layers: IntArray, hot: IntArray, cold: IntArray, given: IntArray, taken: IntArray
    ) -> tuple[FloatArray, IntArray]:
        """[n, slots, slots] fall of the pair's maximum if given[s] and taken[t] change places, and its moves."""
        at = layers[:, None]
        h, c = hot[:, None], cold[:, None]
        weight = self._share[at, given][:, :, None] - self._share[at, taken][:, None, :]
        gap = (self._rank_loads[layers, hot] - self._rank_loads[layers, cold])[:, None, None]
        may_go = (given >= 0) & ~self._holds[at, c, given]
        may_come = ~self._holds[at, h, taken]
        if self._watch_hosts:
            may_go &= self._still_apart(at, given, h, c)
            may_come &= self._still_apart(at, taken, c, h)
        fall = np.where(may_go[:, :, None] & may_come[:, None, :], np.minimum(weight, gap - weight), NEVER)
        return fall, (self._cost(at, given, h, c)[:, :, None] + self._cost(at, taken, c, h)[:, None, :])

    def _replications(
        self, layers: IntArray, hot: IntArray, cold: IntArray, given: IntArray, taken: IntArray
    ) -> tuple[FloatArray, IntArray]:
        """The same if given[s] gets a copy in the slot of taken[t], which loses one."""
        at, n = layers[:, None], np.arange(len(layers))
        c = cold[:, None]
        loads = self._rank_loads[layers]
        copies, surplus = self._counts[at, given], self._counts[at, taken]
        share, removed = self._share[at, given], self._share[at, taken]
        room = self._counts[layers, :-1].sum(axis=1) < self._num_copies
        may_add = (given >= 0) & ~self._holds[at, c, given]
        may_drop = np.where(taken >= 0, surplus > self._min_copies, room[:, None])
        if self._watch_hosts:
            needed = np.minimum(2, copies + 1)
            may_add &= self._spread(at, given) + (self._host_copies[at, self._hosts[c], given] == 0) >= needed
            left = self._spread(at, taken) - (self._host_copies[at, self._hosts[c], taken] == 1)
            may_drop &= (taken < 0) | (left >= np.minimum(2, surplus - 1))
        # a copy of load / k becomes load / (k - 1): each other holder gains the difference
        rise = np.where(taken >= 0, removed / np.maximum(surplus - 1, 1), 0.0)
        holders = self._holds[layers[:, None, None], np.arange(self._ep_size)[None, :, None], taken[:, None, :]]
        on_hot = holders[n, hot] & (taken >= 0)
        holders[n, cold], holders[n, hot] = False, False
        others = np.where(holders.any(axis=1), np.where(holders, loads[:, :, None], NEVER).max(axis=1) + rise, NEVER)
        hot_after = (loads[n, hot][:, None] - share / (copies + 1))[:, :, None] + (rise * on_hot)[:, None, :]
        cold_after = (loads[n, cold][:, None] + share * copies / (copies + 1))[:, :, None] - removed[:, None, :]
        fall = loads[n, hot][:, None, None] - np.maximum(np.maximum(hot_after, cold_after), others[:, None, :])
        fall = np.where(may_add[:, :, None] & may_drop[:, None, :], fall, NEVER)
        cost = (~self._held_before[at, c, given]).astype(np.int64)[:, :, None]
        return fall, cost - (~self._held_before[at, c, taken]).astype(np.int64)[:, None, :]

    def _cost(self, at: IntArray, logical: IntArray, source: IntArray, target: IntArray) -> IntArray:
        """Moves that going from `source` to `target` adds; -1 where it takes one back."""
        added = (~self._held_before[at, target, logical]).astype(np.int64)
        return added - (~self._held_before[at, source, logical]).astype(np.int64)


def choose_steps(start: Int32Array, history: list[list[Step]], max_moves: int) -> Int32Array:
    """`start` after a prefix of each layer's steps, with at most `max_moves` more moves in all.

    Again and again, the layer whose next few steps gain most per move takes them; copies brought back come first."""
    table = start.copy()
    left = max_moves
    tracks = [_Track(steps) for steps in history]
    queue = [(-ratio, layer, step) for layer, track in enumerate(tracks) for ratio, step in track.next(left)]
    heapq.heapify(queue)
    while queue:
        _, layer, step = heapq.heappop(queue)
        track = tracks[layer]
        if track.moves_to(step) <= left:
            left -= track.moves_to(step)
            for edits in (taken.edits for taken in history[layer][track.position + 1 : step + 1]):
                for rank, slot, logical in edits:
                    table[layer, rank, slot] = logical
            track.position = step
        for ratio, following in track.next(left):
            heapq.heappush(queue, (-ratio, layer, following))
    return table


class _Track:
    """Where one layer stands in its steps, and which stretch of them to take next."""

    def __init__(self, steps: list[Step]) -> None:
        self.position = 0
        self._moves = np.asarray([step.num_moves for step in steps], dtype=np.int64)
        self._value = np.cumsum([step.worth for step in steps]) - np.asarray([step.max_load for step in steps])

    def moves_to(self, step: int) -> int:
        return int(self._moves[step] - self._moves[self.position])

    def next(self, left: int) -> list[tuple[float, int]]:
        """(gain per move, step) of the best stretch that fits into `left` moves; empty when there is none."""
        moves = self._moves[self.position + 1 :] - self._moves[self.position]
        gain = self._value[self.position + 1 :] - self._value[self.position]
        ratio = np.where((moves <= left) & (gain > 0), gain / np.maximum(moves, 1e-6), 0.0)
        if not len(ratio) or ratio.max() <= 0:
            return []
        best = int(ratio.argmax())
        return [(float(ratio[best]), self.position + 1 + best)]
