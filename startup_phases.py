"""Where the seconds of a process's start go: named phases, one after the other, for its log and its report.

Why a record and not log lines: the same figures are read by people (`expertmesh serve` prints them while processes
load), by `bench/step.py` and by tests. Phases of one name add up, so a loop over layers is one phase; the time between
them is nobody's and shows as the difference to `total_s`."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class StartupPhases:
    """Safe from any thread: experts are loaded in another one than the attention tier's weights."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._seconds: dict[str, float] = {}  # by phase, in the order in which they began
        self._notes: dict[str, str] = {}
        self._running = ""
        self._lock = threading.Lock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`; a phase inside another one counts in both."""
        began = self._clock()
        with self._lock:
            self._seconds.setdefault(name, 0.0)
            outer, self._running = self._running, name
        try:
            yield
        finally:
            with self._lock:
                self._seconds[name] += self._clock() - began
                self._running = outer

    def note(self, name: str, text: str) -> None:
        """Something about a phase, shown behind its seconds: "58.0 GB, 9.6 GB/s"."""
        with self._lock:
            self._notes[name] = text

    @property
    def seconds(self) -> dict[str, float]:
        with self._lock:
            return dict(self._seconds)

    @property
    def total_s(self) -> float:
        """Since this record was made."""
        return self._clock() - self._started

    def log(self, who: str) -> None:
        logger.info("%s: %.1f s since its start: %s", who, self.total_s, self)

    def __str__(self) -> str:
        """ "weights 6.1 s (1.5 GB/s), kv 0.2 s, graphs ..."; dots where a phase runs."""
        with self._lock:
            parts = []
            for name, seconds in self._seconds.items():
                note = f" ({self._notes[name]})" if name in self._notes else ""
                parts.append(f"{name} ..." if name == self._running else f"{name} {seconds:.1f} s{note}")
        return ", ".join(parts)
