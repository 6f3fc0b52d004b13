"""Where a model comes from: a folder, the URL of one, or a hub id; and its files on this host.

A remote model has a folder in the host's cache. `model_folder` brings everything that is not weights (configuration,
tokenizer, index: some MB). Weights come when a tensor is read: `open_model` gives a Checkpoint that fetches the ranges
that it reads (`remote_file.py`), so an expert shard fetches its own experts and nothing else. A hub id is pinned to a
commit once, by the process that starts the cluster, so that all hosts serve the same files.

Layout of the hub: GET api/models/ID/revision/REV?blobs=true names files, sizes and SHA-256s; ID/resolve/REV/FILE is the
file. A plain URL may have a SHA256SUMS beside the files, in the format of sha256sum."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from .config import WeightsConfig
from .errors import CheckpointError, ModelNotFound
from .model_config import ModelConfig
from .remote_file import Expected, RemoteFile, fetch_text

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

REQUIRED = ("config.json",)
OPTIONAL = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "model.safetensors.index.json",
)
SUMS = "SHA256SUMS"
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def model_folder(model: str, config: WeightsConfig) -> Path:
    """A local folder with everything of the model but its weights, which a local model has too."""
    remote = _remote(model, config)
    if remote is None:
        return Path(model).expanduser().resolve()
    remote.bring_description()
    return remote.folder


def open_model(model: str, config: WeightsConfig) -> "Checkpoint":
    """The model's tensors, fetched as they are read where the model is remote; or noise (`load_format`)."""
    from .checkpoint import Checkpoint  # and torch, which a gateway does without

    if config.load_format == "dummy":
        from .dummy_checkpoint import DummyCheckpoint

        return DummyCheckpoint(model_folder(model, config))
    remote = _remote(model, config)
    if remote is None:
        return Checkpoint(model_folder(model, config))
    remote.bring_description()
    return Checkpoint(remote.folder, files=remote)


def pinned(model: str, config: WeightsConfig) -> str:
    """The name under which every host finds the same files: an absolute path, the URL, or ORG/NAME@COMMIT."""
    remote = _remote(model, config)
    return str(Path(model).expanduser().resolve()) if remote is None else remote.name


def model_name(model: str) -> str:
    """What clients call it by default: the last part of the name, without a revision."""
    return model.rstrip("/").rpartition("/")[2].partition("@")[0]


class RemoteModel:
    """The files of one model on a server (`checkpoint.Files`)."""

    def __init__(self, name: str, base_url: str, folder: Path, config: WeightsConfig, *, token: str = "") -> None:
        self.name, self.folder = name, folder
        self._base_url, self._config, self._token = base_url, config, token
        self._listing: Mapping[str, Expected] | None = None  # None = the server does not list its files
        self._files: dict[str, RemoteFile] = {}

    def bring_description(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._listing = self._list()
        for name in REQUIRED:
            self._file(name).require()
        for name in OPTIONAL:
            if self._listing is None or name in self._listing:
                self._bring_optional(name)

    def open(self, name: str, begin: int, end: int | None) -> int:
        whole = self._config.whole_files
        return self._file(name).open(*((0, None) if whole else (begin, end)))

    def size(self, name: str) -> int:
        return self._file(name).require(0, 0).stat().st_size  # the cached file is sparse, but as long as the real one

    def _file(self, name: str) -> RemoteFile:
        if name not in self._files:
            expected = (self._listing or {}).get(name)
            url = f"{self._base_url}/{quote(name)}"
            self._files[name] = RemoteFile(url, self.folder / name, self._config, expected=expected, token=self._token)
        return self._files[name]

    def _bring_optional(self, name: str) -> None:
        absent = self.folder / f"{name}.absent"
        if absent.exists():
            return
        try:
            self._file(name).require()
        except ModelNotFound as error:
            if error.status != 404:
                raise
            absent.touch()  # whoever comes next on this host need not ask

    def _list(self) -> Mapping[str, Expected] | None:
        """From SHA256SUMS, where the server has one."""
        self._bring_optional(SUMS)
        path = self.folder / SUMS
        if not path.exists():
            return None
        found: dict[str, Expected] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            digest, _, name = line.partition(" ")
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise CheckpointError(f"not a line of sha256sum: {line[:80]!r}", file=f"{self._base_url}/{SUMS}")
            found[name.strip().removeprefix("*").removeprefix("./")] = Expected(sha256=digest)
        return found


class HubModel(RemoteModel):
    """A model of a Hugging Face hub at one commit."""

    def __init__(self, hub_id: str, commit: str, listing: Path, config: WeightsConfig) -> None:
        endpoint = config.hub_endpoint.rstrip("/")
        super().__init__(
            f"{hub_id}@{commit}",
            f"{endpoint}/{hub_id}/resolve/{commit}",
            listing.parent / commit,
            config,
            token=config.hub_token,
        )
        self._listing_file = listing

    def _list(self) -> Mapping[str, Expected]:
        raw = json.loads(self._listing_file.read_text(encoding="utf-8"))
        found = {}
        for entry in raw["siblings"]:
            sha256 = (entry.get("lfs") or {}).get("sha256", "")
            found[entry["rfilename"]] = Expected(num_bytes=entry.get("size", -1), sha256=sha256)
        return found


def _remote(model: str, config: WeightsConfig) -> RemoteModel | None:
    cache = Path(config.cache_dir).expanduser()
    if model.startswith(("http://", "https://")):
        base_url = model.rstrip("/")
        readable = re.sub(r"[^\w.-]+", "-", base_url.partition("://")[2])[-80:]
        folder = cache / f"{readable}-{hashlib.sha256(base_url.encode()).hexdigest()[:12]}"
        return RemoteModel(base_url, base_url, folder, config)
    hub = _HUB_ID.fullmatch(model)
    if hub is None or Path(model).expanduser().exists():
        return None
    hub_id, revision = hub["id"], hub["revision"] or "main"
    folder = cache / hub_id.replace("/", "--")
    return HubModel(hub_id, *_pin(hub_id, revision, folder, config), config)


def _pin(hub_id: str, revision: str, folder: Path, config: WeightsConfig) -> tuple[str, Path]:
    """The commit that a revision means now, and the file that lists it. A commit is asked for once per host."""
    url = f"{config.hub_endpoint.rstrip('/')}/api/models/{hub_id}/revision/{quote(revision, safe='')}?blobs=true"
    if _COMMIT.fullmatch(revision) and (folder / f"{revision}.json").exists():
        return revision, folder / f"{revision}.json"
    try:
        text = fetch_text(url, config, token=config.hub_token)
    except ModelNotFound as error:
        message = f"neither a folder on this host nor a model on the hub ({error.status})"
        raise ModelNotFound(f"{hub_id}@{revision}: {message}", status=error.status) from error
    commit = str(json.loads(text)["sha"])
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".{commit}.{os.getpid()}.{threading.get_ident()}"
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, folder / f"{commit}.json")
    return commit, folder / f"{commit}.json"


def describe_model(model: str, config: WeightsConfig) -> ModelConfig:
    """What the model's config.json says."""
    return ModelConfig.from_folder(model_folder(model, config))
