"""A file server on loopback with the failures of real ones: cut connections, lies, silence, redirects, no ranges."""

import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FileServer:
    """Serves a folder at `url`. Set the public fields to make it misbehave."""

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.folder = folder
        self.ranges = True
        self.cut_after: Callable[[str, int], int | None] = lambda name, number: None  # bytes of the number-th answer
        self.status: Callable[[str, int], int] = lambda name, number: 200
        self.garble: Callable[[str, bytes], bytes] = lambda name, data: data
        self.pause_s = 0.0  # before every piece of 64 KiB
        self.token = ""  # asked for where it is not empty
        self.commit = "0" * 40  # of the hub's one model
        self.requests: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self.tokens_at_cdn: list[str] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with server._lock:
                    server._now += 1
                    server.most_at_once = max(server.most_at_once, server._now)
                try:
                    server._answer(self)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with server._lock:
                        server._now -= 1

            def log_message(self, *_arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://{host}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "FileServer":
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # ---- answers

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        name = path.rpartition("/")[2]
        with self._lock:
            self.requests[name] += 1
            number = self.requests[name]
        status = self.status(name, number)
        at_cdn = path.startswith("/cdn/")
        if at_cdn:
            self.tokens_at_cdn.append(handler.headers.get("Authorization", ""))
        elif self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
            status = 401
        if status != 200:
            return self._say(handler, status)
        if path.startswith("/api/models/"):
            return self._say(handler, 200, json.dumps(self._listing()).encode())
        if not (self.folder / name).is_file():
            return self._say(handler, 404)
        if "/resolve/" in path and name.endswith(".safetensors"):  # as the hub does: large files are elsewhere
            handler.send_response(302)
            handler.send_header("Location", f"http://localhost:{self.port}/cdn/{name}")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        return self._send(handler, name, number)

    def _send(self, handler: BaseHTTPRequestHandler, name: str, number: int) -> None:
        data = (self.folder / name).read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", "")) if self.ranges else None
        if asked and handler.headers.get("If-Range", etag) == etag:
            if int(asked[1]) >= len(data):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(data)}")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            handler.send_response(200)
        handler.send_header("ETag", etag)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        data = self.garble(name, data)
        cut = self.cut_after(name, number)
        for at in range(0, len(data), 1 << 16):
            if self.pause_s:
                time.sleep(self.pause_s)
            piece = data[at : at + (1 << 16)]
            if cut is not None and at + len(piece) > cut:
                handler.wfile.write(piece[: max(0, cut - at)])
                handler.close_connection = True
                return
            handler.wfile.write(piece)
            with self._lock:
                self.bytes_sent[name] += len(piece)

    def _listing(self) -> dict[str, Any]:
        siblings = []
        for path in sorted(self.folder.iterdir()):
            entry: dict[str, Any] = {"rfilename": path.name, "size": path.stat().st_size}
            if path.suffix == ".safetensors":
                entry["lfs"] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
            siblings.append(entry)
        return {"sha": self.commit, "siblings": siblings}

    @staticmethod
    def _say(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"") -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)


if __name__ == "__main__":  # FOLDER HOST PORT
    with FileServer(Path(sys.argv[1]), host=sys.argv[2], port=int(sys.argv[3])):
        threading.Event().wait()
