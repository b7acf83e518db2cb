"""A real S3 server on loopback, and a layer before it that does to answers what networks do."""

from __future__ import annotations

import io
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.ranks import free_port


class Faulty:
    """WSGI middleware. Faults are chosen by the object's name; `counts` says how often each came."""

    def __init__(self, app: Callable) -> None:
        self.app = app
        self.lock = threading.Lock()
        self.go = threading.Event()
        self.reset()

    def reset(self) -> None:
        self.go.set()
        self.go = threading.Event()  # lets answers that hang go on
        self.hanging: dict[str, int] = {}  # name: answers before one hangs
        self.failing = 0.0  # part of GET requests that end in 503
        self.truncated: dict[str, int] = {}  # name: the next answers that break off in the middle
        self.corrupt: dict[str, int] = {}  # name: the next answers of the same size with other bytes
        self.slow: dict[str, float] = {}  # name: seconds before each 64 KiB
        self.failing_puts = 0.0  # part of what is sent that ends in 503
        self.cut: dict[str, int] = {}  # name: the next objects of which half is stored
        self.stuck: set[str] = set()  # names whose sending hangs
        self.slow_puts: dict[str, float] = {}  # name: seconds before it is stored
        self.counts: Counter[str] = Counter()
        self.puts: list[str] = []  # paths
        self.gets: list[tuple[str, str]] = []  # path and range
        self.random = random.Random(0)

    def take(self, faults: dict[str, int], path: str) -> bool:
        for name, left in faults.items():
            if path.endswith(name) and left:
                faults[name] -= 1
                return True
        return False

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        path = environ["PATH_INFO"].encode("latin-1").decode()
        if environ["REQUEST_METHOD"] in ("PUT", "POST"):
            return self.store(path, environ, start_response)
        if environ["REQUEST_METHOD"] != "GET":
            return self.app(environ, start_response)
        with self.lock:
            self.gets.append((path, environ.get("HTTP_RANGE", "")))
            fails = self.random.random() < self.failing
            truncated, corrupt = (not fails and self.take(faults, path) for faults in (self.truncated, self.corrupt))
            delay = next((seconds for name, seconds in self.slow.items() if path.endswith(name)), 0.0)
            given = sum(earlier.endswith(name) for name in self.hanging for earlier, _ in self.gets if path == earlier)
            hangs = any(path.endswith(name) and given > answers for name, answers in self.hanging.items())
            for fault, fired in (("503", fails), ("truncated", truncated), ("corrupt", corrupt), ("slow", delay)):
                self.counts[fault] += bool(fired)
        if fails:
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return []
        if hangs:
            self.go.wait(60)
        body = b"".join(self.app(environ, start_response))
        if corrupt:
            body = bytes([body[0] ^ 1]) + body[1:]
        return self.send(body[: len(body) // 2] if truncated else body, delay)

    def store(self, path: str, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        with self.lock:
            self.puts.append(path)
            fails = self.random.random() < self.failing_puts
            cut = not fails and self.take(self.cut, path)
            delay = next((seconds for name, seconds in self.slow_puts.items() if path.endswith(name)), 0.0)
            for fault, fired in (("503", fails), ("cut", cut), ("slow", delay)):
                self.counts[fault] += bool(fired)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if fails:
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return []
        time.sleep(delay)
        if any(path.endswith(name) for name in self.stuck):
            self.go.wait(60)
        if cut:
            body = body[: len(body) // 2]
        return self.app({**environ, "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}, start_response)

    def send(self, body: bytes, delay: float) -> Iterator[bytes]:
        for start in range(0, len(body), 1 << 16):
            time.sleep(delay)
            yield body[start : start + (1 << 16)]


@contextmanager
def s3_server() -> Iterator[tuple[str, Faulty]]:
    """The server's address, and its faults; none at first."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from s3fs import S3FileSystem
    from werkzeug.serving import make_server

    class Quiet(MotoRequestHandler):
        def log_request(self, *args: object) -> None: ...

    port = free_port()
    faulty = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", port, faulty, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    S3FileSystem.clear_instance_cache()  # fsspec keeps one, with the address of the server before
    try:
        yield f"http://127.0.0.1:{port}", faulty
    finally:
        S3FileSystem.clear_instance_cache()
        server.shutdown()
        server.server_close()
        thread.join()
