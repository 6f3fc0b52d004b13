"""One thread that calls back at a time: the leader's grace. Started at its first use, asleep without a deadline."""

import threading
from collections.abc import Callable
from time import monotonic


class Timer:
    """`set(at)` (monotonic seconds) replaces the time set before; `callback` runs in the timer's thread."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._changed = threading.Condition()
        self._at: float | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def set(self, at: float) -> None:
        with self._changed:
            self._at = at
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="leader-timer", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while self._wait():
            self._callback()

    def _wait(self) -> bool:
        """True when the time has come, False when closed."""
        with self._changed:
            while not self._closed:
                wait_s = None if self._at is None else self._at - monotonic()
                if wait_s is not None and wait_s <= 0:
                    self._at = None
                    return True
                self._changed.wait(wait_s)
            return False
