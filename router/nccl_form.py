"""Which form a turn of the exchange over NCCL takes. Pure: a function of membership, header and shapes alone, so that
every rank finds the same one and it may stand in a graph's key.

*Padded*: a place for every (token, k) of every source and owner; nothing can be without one. An owner answers 1 of n
pairs, so n - 1 of n bytes of its answers are empty. *Bounded*: rows go there padded, but the answers of one owner to
one source have `bound` places: the even share, more by a quarter with two owners and by a quarter more with each
doubling (shares of fewer experts differ more), and four standard deviations of an even draw. It costs a launch and a
copy, so it is used where it saves `worth_bytes`: 1 MiB is 4 to 9 us over NVLink, by NCCL's channels, and 20 us over a
network. *Exact*: counts are read by the host; where neither is: above `exact_above` rows a source in a `whole` step,
and with more owners than `MOST_BOUNDED`, who need less than two rows of three.

A source whose answers do not fit knows it by itself when the step is over: its step alone is void, it asks for the next
ones to be whole (`guard.py`), and the header says so to all. Idea: the capacity factor of GShard and Switch, though
nothing is dropped."""

import math
from dataclasses import dataclass

MOST_BOUNDED = 8  # owners: above, rows are sent to too many that do not need them, in turns that are not small


@dataclass(frozen=True, slots=True, kw_only=True)
class NcclForms:
    """Of one membership."""

    num_owners: int
    top_k: int
    row_bytes: int
    exact_above: int  # rows of a source
    worth_bytes: int = 1 << 20
    deviations: float = 4.0

    def bound(self, stride: int, *, whole: bool) -> int:
        """Places for the answers of one owner to one source; 0 = not in the bounded form."""
        if whole or (stride > self.exact_above and self.num_owners > MOST_BOUNDED):
            return 0
        full = stride * self.top_k
        even = full / self.num_owners
        share = 1.25 + 0.25 * max(0.0, math.log2(self.num_owners) - 1)
        places = math.ceil(share * even + self.deviations * math.sqrt(even))
        saved = (self.num_owners - 1) * (full - places) * self.row_bytes
        return places if places < full and saved >= self.worth_bytes else 0

    def is_exact(self, stride: int, *, whole: bool) -> bool:
        return stride > self.exact_above and not self.bound(stride, whole=whole)
