"""Streams that run while a cluster changes, each compared with what a single process says."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from solo_engine import NUM_TOKENS, PROMPTS
from test_cluster import greedy, token_ids

from expertmesh.client import AnswerDelta, Client, ReasoningDelta

NUM_BRIEF = 60  # tokens: far below a gateway's grace, on a busy machine too
BREATH_S = 0.5  # between two streams of a prompt: on two cores what starts meanwhile would wait for all of them


class Listener:
    """Reads one stream in a thread and notes when each token came."""

    def __init__(self, client: Client, prompt: list[int]) -> None:
        self._stream = greedy(client, prompt, NUM_TOKENS)
        self.token_ids: list[int] = []
        self.came_at: list[float] = []
        self.error: Exception | None = None
        self.begun = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        try:
            for event in self._stream:
                if isinstance(event, AnswerDelta | ReasoningDelta):
                    self.token_ids += event.token_ids
                    self.came_at += [time.monotonic()] * len(event.token_ids)
                    self.begun.set()
        except Exception as error:  # shown by the test's thread
            self.error = error
        self.begun.set()

    def finish(self) -> list[int]:
        self._thread.join(timeout=60.0)
        assert not self._thread.is_alive(), f"{len(self.token_ids)} tokens, then nothing"
        if self.error is not None:
            raise self.error
        return self.token_ids

    def pause_after(self, moment: float) -> float:
        """The longest wait for a token that ended after `moment`."""
        gaps = [b - a for a, b in zip(self.came_at, self.came_at[1:], strict=False) if b > moment]
        return max(gaps, default=0.0)


def listeners(client: Client) -> list[Listener]:
    """One for each prompt, all with a token."""
    begun = [Listener(client, prompt) for prompt in PROMPTS]
    for listener in begun:
        assert listener.begun.wait(60.0)
    return begun


@contextlib.contextmanager
def threads_of(
    repeat: Callable[..., None], pairs: Iterable[tuple[Any, ...]], enough: threading.Event
) -> Iterator[None]:
    """One for each pair, until the block is left; they heed `enough`."""
    threads = [threading.Thread(target=repeat, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join(timeout=120.0)
    assert not any(thread.is_alive() for thread in threads), "a stream has not ended"


@contextlib.contextmanager
def under_load(client: Client, expected: list[list[int]]) -> Iterator[None]:
    """One stream of each prompt after the other, all compared; the last ones end after the block."""
    enough = threading.Event()
    failures: list[str] = []
    pauses_s: list[float] = []

    def repeat(prompt: list[int], want: list[int]) -> None:
        while not enough.is_set() and not failures:
            listener = Listener(client, prompt)
            try:
                if listener.finish() != want:
                    failures.append(f"{prompt}: other tokens")
            except Exception as error:
                failures.append(f"{prompt}: {error!r}")
            pauses_s.append(listener.pause_after(0.0))
            enough.wait(BREATH_S)

    with threads_of(repeat, zip(PROMPTS, expected, strict=True), enough):
        yield
    assert not failures
    print(f"\n{len(pauses_s)} streams, the longest pause {max(pauses_s):.3f} s")


@contextlib.contextmanager
def resumable_streams(client: Client, expected: list[list[int]]) -> Iterator[None]:
    """Brief ones, one after the other for each prompt, all compared. A gateway that drains cuts what lasts longer than
    its grace; the client goes on with it at the other gateway."""
    enough = threading.Event()
    wrong: list[str] = []
    num_streams = [0]

    def repeat(prompt: list[int], want: list[int]) -> None:
        while not enough.is_set() and not wrong:
            try:
                stream = client.generate(
                    token_ids=prompt,
                    include_token_ids=True,
                    resumable=True,
                    temperature=0.0,
                    max_tokens=NUM_BRIEF,
                    ignore_eos=True,
                    timeout_s=120.0,
                )
                if (got := token_ids(stream)) != want:
                    wrong.append(f"{prompt[:3]}: {len(got)} tokens, not those of one process")
            except Exception as error:
                wrong.append(f"{prompt[:3]}: {error!r}")
            num_streams[0] += 1
            enough.wait(BREATH_S)

    with threads_of(repeat, zip(PROMPTS, expected, strict=False), enough):
        yield
    assert not wrong
    print(f"\n{num_streams[0]} streams over the upgrade")
