"""One file on an HTTP server, as much of it in a local cache as somebody has asked for.

The cached file is sparse: chunks of one MiB, and beside it a journal of which chunks are there. So a process fetches
only the ranges that hold its tensors, an interrupted fetch goes on where it ended, and all processes of a host share
what any of them has fetched. Whoever fetches holds a lock on the file (released by the kernel if it dies) and uses
several connections. When the last chunk is there, size and, where it is known, SHA-256 are checked and the file gets
its final name in one rename: a file without `.part` is whole."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from .config import WeightsConfig
from .errors import ChecksumMismatch, DiskFull, DownloadFailed, ModelNotFound

CHUNK_BYTES = 1 << 20
REQUEST_BYTES = 4 << 20  # of one request; a larger range goes over several connections at once
_HASH_BYTES = 8 << 20
_AGAIN_STATUS = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What is known about a file before it is fetched; -1 and empty = not known."""

    num_bytes: int = -1
    sha256: str = ""


def fetch_text(url: str, config: WeightsConfig, *, token: str = "", sleep: Callable[[float], None] = time.sleep) -> str:
    """A small answer, not kept."""
    with RemoteFile(url, Path(os.devnull), config, token=token, sleep=sleep).ask() as response:
        return response.text


class RemoteFile:
    """`require` is safe from any thread of any process; they wait for one another."""

    def __init__(
        self,
        url: str,
        path: Path,
        config: WeightsConfig,
        *,
        expected: Expected | None = None,
        token: str = "",
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`token` is sent to `url`'s own host only, never to where it redirects."""
        self.url, self.path, self._config, self._sleep = url, path, config, sleep
        self._part, self._journal_path = path.with_name(path.name + ".part"), path.with_name(path.name + ".chunks")
        self._expected, self._token = expected or Expected(), token
        self._moved_to = ""  # where the server sent us; asked first until it refuses
        self._session = requests.Session()
        self._session.mount("https://", HTTPAdapter(pool_maxsize=config.num_connections))
        self._session.mount("http://", HTTPAdapter(pool_maxsize=config.num_connections))

    def require(self, begin: int = 0, end: int | None = None) -> Path:
        """Have bytes [begin, end) here (to the file's end where `end` is None); the path to read them from.

        Another process may finish the file between this call and yours: a missing `.part` is then at `path`."""
        if self.path.exists():
            return self.path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.with_name(self.path.name + ".lock")):
            if self.path.exists():
                return self.path
            with _no_space_is_typed(self.path):
                return self._fetch(begin, end)

    def ask(self) -> requests.Response:
        """The whole file as the server sends it, past the cache."""
        return self._patiently(lambda: self._request(""))

    def open(self, begin: int = 0, end: int | None = None) -> int:
        """A descriptor to read bytes [begin, end) from; the caller closes it."""
        try:
            return os.open(self.require(begin, end), os.O_RDONLY)
        except FileNotFoundError:
            return os.open(self.path, os.O_RDONLY)

    # ---- with the lock held

    def _fetch(self, begin: int, end: int | None) -> Path:
        for attempt in (1, 2):
            journal = _Journal.load(self._journal_path) if self._part.exists() else None
            if journal is None:
                journal = self._begin()
            self._fill(journal, begin, journal.num_bytes if end is None else min(end, journal.num_bytes))
            if not journal.whole:
                return self._part
            actual = _sha256(self._part) if self._expected.sha256 else ""
            if actual == self._expected.sha256:
                os.replace(self._part, self.path)
                self._journal_path.unlink()
                return self.path
            self._forget()
            if attempt == 2:
                raise ChecksumMismatch(self.url, expected=self._expected.sha256, actual=actual)
        raise AssertionError("unreachable")

    def _begin(self) -> "_Journal":
        """Ask for the size, and make an empty sparse file of it."""
        with self._patiently(lambda: self._request("bytes=0-0")) as response:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            ranges = response.status_code in (206, 416) and found is not None
            size = int(found[3]) if found else int(response.headers.get("Content-Length", -1))
            etag = response.headers.get("ETag", "")
        if size < 0:
            raise DownloadFailed(self.url, "the server does not say how long the file is")
        if self._expected.num_bytes not in (-1, size):
            message = f"the server has {size} bytes, {self._expected.num_bytes} were expected: another version"
            raise DownloadFailed(self.url, message)
        free = shutil.disk_usage(self.path.parent).free
        if free < (size if not ranges else CHUNK_BYTES):
            raise DiskFull(str(self.path.parent), needed=size, free=free)
        with self._part.open("wb") as part:
            part.truncate(size)
        return _Journal.create(self._journal_path, num_bytes=size, etag=etag, ranges=ranges)

    def _fill(self, journal: "_Journal", begin: int, end: int) -> None:
        if not journal.ranges:
            begin, end = 0, journal.num_bytes
        requests_ = list(journal.missing(begin, end))
        needed, free = sum(last - first for first, last in requests_), shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise DiskFull(str(self.path.parent), needed=needed, free=free)
        part = os.open(self._part, os.O_WRONLY)
        pool = ThreadPoolExecutor(self._config.num_connections if journal.ranges else 1, "fetch")
        try:
            for done in as_completed([pool.submit(self._get, journal, part, *range_) for range_ in requests_]):
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)
            os.close(part)

    def _get(self, journal: "_Journal", part: int, first: int, end: int) -> None:
        """Bytes [first, end) into the part file; goes on where a broken connection stopped."""
        at, attempts, trouble = first, 0, ""
        while at < end:
            if attempts == self._config.max_attempts:
                raise DownloadFailed(self.url, f"{at - first} of {end - first} bytes from {first} on came: {trouble}")
            if attempts:
                self._sleep(min(0.1 * 2**attempts, 5.0))
            attempts += 1
            begun = at
            try:
                at = self._stream(journal, part, at, end)
                trouble = "the connection ended early"
            except (requests.RequestException, _Again) as error:
                trouble = str(error)
                at = max(at, journal.reached(begun, end))
            if not journal.ranges and at < end:
                at = 0
            elif at > begun:
                attempts = 1  # it moves

    def _stream(self, journal: "_Journal", part: int, at: int, end: int) -> int:
        """One request; the first byte that did not come."""
        begun = at
        with self._request(f"bytes={at}-{end - 1}" if journal.ranges else "", etag=journal.etag) as response:
            if journal.ranges:
                found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
                if (
                    response.status_code != 206
                    or not found
                    or (found[1], int(found[3])) != (str(at), journal.num_bytes)
                ):
                    self._forget()
                    raise DownloadFailed(self.url, "the file has changed on the server; what was fetched is dropped")
            try:
                for piece in response.iter_content(CHUNK_BYTES):
                    piece = piece[: end - at]
                    os.pwrite(part, piece, at)
                    at += len(piece)
            finally:
                os.fdatasync(part)  # a chunk is marked when it is on the disk
                if journal.ranges or at == end:
                    journal.mark(begun, at)
        return at

    def _patiently(self, ask: Callable[[], requests.Response]) -> requests.Response:
        trouble = ""
        for attempt in range(self._config.max_attempts):
            if attempt:
                self._sleep(min(0.1 * 2**attempt, 5.0))
            try:
                return ask()
            except (requests.RequestException, _Again) as error:
                trouble = str(error)
        raise DownloadFailed(self.url, trouble)

    def _request(self, range_: str, etag: str = "") -> requests.Response:
        """ModelNotFound where it is not there or not ours to see; _Again where trying again may help."""
        headers = {"Accept-Encoding": "identity"}
        if range_:
            headers["Range"] = range_
            if etag and not etag.startswith("W/"):
                headers["If-Range"] = etag
        url = self._moved_to or self.url
        if self._token and urlsplit(url).netloc == urlsplit(self.url).netloc:
            headers["Authorization"] = f"Bearer {self._token}"
        seconds = (self._config.timeout_s, self._config.timeout_s)
        try:
            response = self._session.get(url, headers=headers, stream=True, timeout=seconds)
        except requests.RequestException:
            self._moved_to = ""
            raise
        if response.status_code < 400 or response.status_code == 416:
            self._moved_to = response.url
            return response
        response.close()
        if self._moved_to or response.status_code in _AGAIN_STATUS:
            self._moved_to = ""  # a signed address lives for a while only
            raise _Again(f"the server says {response.status_code} {response.reason}")
        raise ModelNotFound(self.url, status=response.status_code)

    def _forget(self) -> None:
        self._journal_path.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)


class _Again(Exception):
    pass


class _Journal:
    """Which chunks of a file are there: a line of JSON, then one character a chunk."""

    def __init__(self, path: Path, head: dict[str, object], body: bytes, offset: int) -> None:
        self._path, self._chunks, self._offset = path, bytearray(body), offset
        self.num_bytes, self.etag, self.ranges = int(str(head["num_bytes"])), str(head["etag"]), bool(head["ranges"])

    @classmethod
    def create(cls, path: Path, *, num_bytes: int, etag: str, ranges: bool) -> "_Journal":
        head = json.dumps({"num_bytes": num_bytes, "etag": etag, "ranges": ranges}).encode() + b"\n"
        body = b"0" * -(-num_bytes // CHUNK_BYTES)
        fresh = path.with_name(path.name + ".new")
        fresh.write_bytes(head + body)
        os.replace(fresh, path)
        return cls(path, json.loads(head), body, len(head))

    @classmethod
    def load(cls, path: Path) -> "_Journal | None":
        try:
            line, _, body = path.read_bytes().partition(b"\n")
            return cls(path, json.loads(line), body, len(line) + 1)
        except (OSError, ValueError, KeyError):
            return None

    @property
    def whole(self) -> bool:
        return b"0" not in self._chunks

    def missing(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Ranges of bytes to ask for, each of whole chunks and at most REQUEST_BYTES; one range without ranges."""
        most = REQUEST_BYTES // CHUNK_BYTES if self.ranges else len(self._chunks)
        chunk, last = begin // CHUNK_BYTES, -(-end // CHUNK_BYTES)
        while chunk < last:
            if self._chunks[chunk] == ord("1"):
                chunk += 1
                continue
            first = chunk
            while chunk < last and chunk - first < most and self._chunks[chunk] == ord("0"):
                chunk += 1
            if not self.ranges:
                chunk = last
            yield first * CHUNK_BYTES, min(chunk * CHUNK_BYTES, self.num_bytes)

    def mark(self, begin: int, end: int) -> None:
        """Bytes [begin, end) are on the disk; `begin` lies at a chunk's start, or in a chunk that goes on."""
        first = begin // CHUNK_BYTES
        last = len(self._chunks) if end == self.num_bytes else end // CHUNK_BYTES
        if first < last:
            self._chunks[first:last] = b"1" * (last - first)
            with contextlib.suppress(FileNotFoundError), self._path.open("r+b") as file:  # dropped by another thread
                os.pwrite(file.fileno(), b"1" * (last - first), self._offset + first)

    def reached(self, begin: int, end: int) -> int:
        """Where a fetch of [begin, end) goes on after it broke: at the first chunk that is not marked."""
        chunk = begin // CHUNK_BYTES
        while chunk < len(self._chunks) and self._chunks[chunk] == ord("1"):
            chunk += 1
        return min(max(begin, chunk * CHUNK_BYTES), end)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _no_space_is_typed(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(str(path.parent), needed=-1, free=shutil.disk_usage(path.parent).free) from None
        raise


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()
