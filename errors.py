"""Every error a caller can meet, as one tree.

    ExpertMeshError
    ├── InvalidRequest            INVALID_ARGUMENT    a field is wrong: field, value, expected
    ├── NotFound                  NOT_FOUND           kind, name
    ├── Unauthenticated           UNAUTHENTICATED     wrong or missing token or API key
    ├── SessionConflict           ABORTED             another writer committed first: current_version
    ├── Overloaded                RESOURCE_EXHAUSTED  retry after retry_after_s
    │   ├── QueueFull
    │   ├── KVCacheExhausted
    │   └── SlowReader            the client did not read its stream
    ├── Unavailable               UNAVAILABLE         retry after retry_after_s
    │   ├── NoReplica
    │   ├── SessionStoreUnavailable
    │   ├── DownloadFailed        a model's file did not come: url
    │   ├── ReplicaLost
    │   └── ExchangeError         names ep_rank, layer_id, step_id, epoch
    │       ├── ExchangeTimeout
    │       ├── PeerLost
    │       └── GuardError        damaged or non-finite rows: bad; the exchange itself goes on
    ├── DeadlineExceeded          DEADLINE_EXCEEDED
    ├── RequestCancelled          CANCELLED
    ├── EpochError                FAILED_PRECONDITION a stale or impossible epoch or placement
    ├── CheckpointError           FAILED_PRECONDITION file, tensor
    │   ├── ModelNotFound         the server has no such file, or not for us: url, status
    │   ├── ChecksumMismatch      url, expected, actual
    │   └── DiskFull              folder, needed and free bytes
    ├── ConfigError               FAILED_PRECONDITION field
    ├── StartupError              FAILED_PRECONDITION the cluster did not become ready
    ├── KernelError               FAILED_PRECONDITION no GPU, driver, architecture or kernel for this
    └── MissingPackage            FAILED_PRECONDITION an optional package that this request needs: field, name

`code` is the name of the gRPC status, a string so that nothing below the gateway imports grpc. A message says what, how
much and what to do. Facts are fields, so callers never parse messages."""

from typing import Any, ClassVar


class ExpertMeshError(Exception):
    """Root of the tree. `retry_after_s` is set where the same call may succeed later."""

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        """Whatever a subclass's `__init__` takes: it crosses processes with its text and its facts."""
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[ExpertMeshError], arguments: tuple[Any, ...], facts: dict[str, Any]) -> ExpertMeshError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(facts)
    return error


class InvalidRequest(ExpertMeshError):
    """A user's mistake in one field of a request."""

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, value: Any, expected: str) -> None:
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}: got {shown}, expected {expected}")
        self.field, self.value, self.expected = field, value, expected


class NotFound(ExpertMeshError):
    code = "NOT_FOUND"

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"{kind} {name!r} not found: it does not exist, has expired, or belongs to another key")
        self.kind, self.name = kind, name


class Unauthenticated(ExpertMeshError):
    code = "UNAUTHENTICATED"


class SessionConflict(ExpertMeshError):
    code = "ABORTED"
    retryable = True

    def __init__(self, session_id: str, *, expected_version: int, current_version: int) -> None:
        super().__init__(
            f"session {session_id!r} is at version {current_version}, this turn began at {expected_version}: "
            "another turn was committed meanwhile; read the session and try again"
        )
        self.session_id, self.expected_version, self.current_version = session_id, expected_version, current_version


class Overloaded(ExpertMeshError):
    code = "RESOURCE_EXHAUSTED"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class QueueFull(Overloaded):
    pass


class KVCacheExhausted(Overloaded):
    pass


class SlowReader(Overloaded):
    def __init__(self, what: str) -> None:
        super().__init__(
            f"this stream's client {what}, so it was ended; read faster, or ask for a resumable stream and resume it",
            retry_after_s=1.0,
        )


class Unavailable(ExpertMeshError):
    code = "UNAVAILABLE"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class NoReplica(Unavailable):
    pass


class SessionStoreUnavailable(Unavailable):
    pass


class DownloadFailed(Unavailable):
    """Asked again several times; what came is kept, and the next try goes on from there."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url}: {reason}")
        self.url, self.reason = url, reason


class ReplicaLost(Unavailable):
    """`member_id` is set where the process itself is known to be gone: its operating system closed what it held."""

    def __init__(self, message: str, *, member_id: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.member_id = member_id


class ExchangeError(Unavailable):
    """A move of rows between ranks failed; the step can be replayed with the same batch."""

    def __init__(
        self,
        message: str,
        *,
        ep_rank: int,
        layer_id: int,
        step_id: int,
        epoch: int,
        retry_after_s: float = 0.1,
        peer: int = -1,  # rank in the epoch's communicator of who was waited for; -1 = nobody in particular
    ) -> None:
        super().__init__(
            f"{message} (ep_rank {ep_rank}, layer {layer_id}, step {step_id}, epoch {epoch})",
            retry_after_s=retry_after_s,
        )
        self.ep_rank, self.layer_id, self.step_id, self.epoch = ep_rank, layer_id, step_id, epoch
        self.peer = peer


class ExchangeTimeout(ExchangeError):
    pass


class PeerLost(ExchangeError):
    pass


class GuardError(ExchangeError):
    """Rows of this step were damaged on their way or are not finite. Each of `bad` (router/guard.py: BadRow) names
    sender, shard, layer and expert. The communicator is whole: run the same batch again, in the same epoch."""

    def __init__(
        self, message: str, *, bad: tuple[Any, ...], ep_rank: int, layer_id: int, step_id: int, epoch: int
    ) -> None:
        super().__init__(message, ep_rank=ep_rank, layer_id=layer_id, step_id=step_id, epoch=epoch)
        self.bad = bad


class DeadlineExceeded(ExpertMeshError):
    code = "DEADLINE_EXCEEDED"


class RequestCancelled(ExpertMeshError):
    code = "CANCELLED"


class EpochError(ExpertMeshError):
    code = "FAILED_PRECONDITION"


class CheckpointError(ExpertMeshError):
    """A checkpoint that cannot be served: says which file and tensor, and what to do."""

    code = "FAILED_PRECONDITION"

    def __init__(self, message: str, *, file: str = "", tensor: str = "") -> None:
        where = ", ".join(x for x in (f"file {file}" if file else "", f"tensor {tensor}" if tensor else "") if x)
        super().__init__(f"{message} ({where})" if where else message)
        self.file, self.tensor = file, tensor


class ModelNotFound(CheckpointError):
    def __init__(self, url: str, *, status: int = 404) -> None:
        asks = "; it asks who you are: set HF_TOKEN (weights.hub_token)" if status in (401, 403) else ""
        super().__init__(f"the server says {status}: no such model, revision or file{asks}", file=url)
        self.url, self.status = url, status


class ChecksumMismatch(CheckpointError):
    def __init__(self, url: str, *, expected: str, actual: str) -> None:
        super().__init__(f"twice fetched, twice another SHA-256 than {expected}: {actual}", file=url)
        self.url, self.expected, self.actual = url, expected, actual


class DiskFull(CheckpointError):
    """`needed` -1 = not known."""

    def __init__(self, folder: str, *, needed: int, free: int) -> None:
        wanted = f"{needed / 1e9:.1f} GB more are needed, " if needed >= 0 else ""
        super().__init__(f"the disk is full: {wanted}{free / 1e9:.1f} GB are free; set weights.cache_dir", file=folder)
        self.folder, self.needed, self.free = folder, needed, free


class ConfigError(ExpertMeshError):
    code = "FAILED_PRECONDITION"

    def __init__(self, field: str, value: Any, expected: str) -> None:
        super().__init__(f"configuration {field}: got {value!r}, expected {expected}")
        self.field, self.value, self.expected = field, value, expected


class StartupError(ExpertMeshError):
    code = "FAILED_PRECONDITION"


class KernelError(ExpertMeshError):
    code = "FAILED_PRECONDITION"


class MissingPackage(ExpertMeshError):
    """The cluster was installed without the package that this request needs."""

    code = "FAILED_PRECONDITION"

    def __init__(self, field: str, name: str, remedy: str) -> None:
        super().__init__(f"{field}: the cluster's Python has no package {name}; install it with: {remedy}")
        self.field, self.name = field, name
