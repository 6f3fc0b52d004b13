"""The thinking budget of one request: a pure fold over accepted tokens that says which token, if any, is forced next.

Rules (Qwen3's documentation): tokens generated inside the think block are counted, its opener included; when
`budget_tokens` of them are spent and the block is still open, the closing sentence is forced, token by token. Forced
tokens count against max_tokens, not against the budget. A block opened again goes on with the same count. Where the
prompt already opened the block (`starts_inside`) the count starts at 0 with the first generated token.

Why a fold: the state depends on accepted tokens alone, so preemption, replay, failover and a step run twice cannot
change it: accept the same tokens again and the same state is there."""

from ...request import ThinkingBudget


class ThinkingState:
    """Exact to the token: at most `budget_tokens` tokens are ever sampled inside the block."""

    __slots__ = ("_cursor", "budget", "inside", "num_spent")

    def __init__(self, budget: ThinkingBudget) -> None:
        self.budget = budget
        self.inside = budget.starts_inside
        self.num_spent = 0  # tokens sampled inside the block
        self._cursor = -1  # index into closing_ids of the next forced token; -1 = free
        self._check_spent()

    @property
    def forced_id(self) -> int | None:
        """The token that must come next, or None where the model is free."""
        return self.budget.closing_ids[self._cursor] if self._cursor >= 0 else None

    @property
    def cursor(self) -> int:
        """Index into closing_ids of the token that must come next, -1 where the model is free."""
        return self._cursor

    def accept(self, token_id: int) -> None:
        """Take the next accepted token, sampled or forced."""
        budget = self.budget
        if self._cursor >= 0:
            self._cursor += 1
            if token_id == budget.end_think_id:
                self.inside = False
            if self._cursor == len(budget.closing_ids):
                self._cursor = -1
                self.inside = False  # also for a closing sentence without the closing tag
            return
        if token_id == budget.think_id:
            self.inside = True
        if self.inside:
            self.num_spent += 1
        if token_id == budget.end_think_id:
            self.inside = False
        self._check_spent()

    def _check_spent(self) -> None:
        if self.inside and self.num_spent >= self.budget.budget_tokens and self.budget.closing_ids:
            self._cursor = 0
