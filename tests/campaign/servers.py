"""Servers that lie, drip and hang up: a download ends with the right file or with one sentence.

Each trial is a file on a local server that answers its first requests as drawn from a seed, and
every later one as the last of them. Whatever it does, nobody waits for longer than `DEADLINE`.
"""

import base64
import contextlib
import hashlib
import os
import random
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from tests.campaign.runs import Outcome
from vit_jax.interop import download
from vit_jax.system.errors import UserError

SIZE = 60_000  # bytes of a file
# Of the downloader, in place of its own, so that a trial takes no minutes.
TIMEOUT, FLOOR, PAUSES = 0.5, 50_000, (0.02, 0.02)
# Each of its tries connects, reads heads and a body, and none of these takes longer than twice
# its timeout; a file that comes at all comes at FLOOR. The rest is for a machine that is busy.
DEADLINE = (len(PAUSES) + 2) * 6 * TIMEOUT + SIZE / FLOOR + 10
AT_ONCE = 6  # trials: most of their time they wait


class File(NamedTuple):
    """What one path of the server holds, and how it answers."""

    data: bytes
    answers: list[str]
    rng: random.Random


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, File] = {}

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that hang up are right to


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.file = file = self.server.files[path]
        answer = file.answers[0] if len(file.answers) == 1 else file.answers.pop(0)
        ANSWERS["good" if self.path.endswith("?good") else answer](self)

    def head(self, status: int, data: bytes, **changed: str | None) -> None:
        """Status and headers, True ones but for `changed`; None leaves one out."""
        digest = base64.b64encode(hashlib.md5(self.file.data).digest()).decode()
        headers: dict[str, str | None] = {"Content-Length": str(len(data)), "ETag": '"1"'}
        headers |= {"x-goog-hash": f"md5={digest}"}
        headers |= {name.replace("_", "-"): value for name, value in changed.items()}
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def start(self) -> int:
        """The first byte that is asked for, if what there is may be continued."""
        wanted = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")
        return int(wanted) if self.headers.get("If-Range", '"1"') == '"1"' else 0

    def good(self, most: int | None = None, **changed: str | None) -> None:
        """The file from the byte that was asked for, perhaps cut off after `most` bytes."""
        start, data = self.start(), self.file.data
        if start:
            changed = {"Content_Range": f"bytes {start}-{SIZE - 1}/{SIZE}"} | changed
        self.head(206 if start else 200, data[start:], **changed)
        self.wfile.write(data[start:][:most])

    def drip(self, data: bytes) -> None:
        for i in range(len(data)):
            self.wfile.write(data[i : i + 1])
            time.sleep(TIMEOUT / 4)

    def redirect(self, to: str, body: bytes = b"", length: int | None = None) -> None:
        self.head(302, body, Location=to, Content_Length=str(length or len(body)))
        self.wfile.write(body)


def _drip_head(handler: Handler) -> None:
    handler.drip(b"HTTP/1.1 200 OK\r\n" + b"X-Slow: 1\r\n" * 1000)


def _drip_body(handler: Handler) -> None:
    handler.head(200, handler.file.data)
    handler.drip(handler.file.data)


def _endless_head(handler: Handler) -> None:
    for _ in range(100_000):
        handler.wfile.write(b"X-Endless: 1\r\n" * 100)


def _go_on(handler: Handler) -> None:
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(TIMEOUT / 8)


def _drip_redirect(handler: Handler) -> None:
    handler.redirect(f"{handler.path}?good", length=10**9)
    handler.drip(bytes(10_000))


def _flood_redirect(handler: Handler) -> None:
    handler.redirect(f"{handler.path}?good", length=10**12)
    for _ in range(2000):
        handler.wfile.write(bytes(1 << 20))


def _slow_circle(handler: Handler) -> None:
    time.sleep(TIMEOUT * 0.8)
    handler.redirect(f"{handler.path}?{handler.file.rng.random()}")


def _chunked(handler: Handler, end: bool) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.head(200, b"", Content_Length=None, Transfer_Encoding="chunked", Connection="close")
    data = handler.file.data[: SIZE if end else SIZE // 2]
    handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n" + b"0\r\n\r\n" * end)


def _other_version(handler: Handler) -> None:
    """Another file under the name, of which there is another checksum."""
    other = handler.file.data[::-1]
    handler.head(200, other, ETag='"2"', x_goog_hash=None)
    handler.wfile.write(other[: SIZE // 3])


def _wrong_bytes(handler: Handler) -> None:
    handler.head(200, handler.file.data)
    handler.wfile.write(b"x" + handler.file.data[1:])


def _page(handler: Handler, kind: str | None) -> None:
    page = b"\n<!DOCTYPE html>\n<html><body>Log in to this network</body></html>"
    handler.head(200, page, Content_Type=kind, x_goog_hash=None, ETag=None)
    handler.wfile.write(page)


NONSENSE = ("-1", "x", "9" * 30)
NOWHERE = ("file:///etc/passwd", "", "//", "http://[", "x:y")
ANSWERS = {
    "good": Handler.good,
    "cut": lambda h: h.good(h.file.rng.randrange(SIZE)),
    "a byte": lambda h: h.good(1),
    "nothing": lambda h: h.good(0),
    "silent": lambda h: time.sleep(3 * TIMEOUT),
    "hangs up": lambda h: None,
    "drips the head": _drip_head,
    "drips the body": _drip_body,
    "endless head": _endless_head,
    "goes on": _go_on,
    "garbage": lambda h: h.wfile.write(h.file.rng.randbytes(500)),
    "claims more": lambda h: h.good(Content_Length=str(SIZE + 100)),
    "claims less": lambda h: h.good(Content_Length=str(SIZE - 100)),
    "claims nonsense": lambda h: h.good(Content_Length=h.file.rng.choice(NONSENSE)),
    "says no length": lambda h: h.good(Content_Length=None),
    "no length, cut": lambda h: h.good(SIZE // 2, Content_Length=None),
    "no checksum": lambda h: h.good(SIZE // 2, Content_Length=None, x_goog_hash=None),
    "chunked": lambda h: _chunked(h, True),
    "chunked, cut": lambda h: _chunked(h, False),
    "weak ETag, cut": lambda h: h.good(SIZE // 2, ETag='W/"1"'),
    "odd ETag, cut": lambda h: h.good(SIZE // 2, ETag='"\x80\xff"'),
    "other version, cut": _other_version,
    "wrong range": lambda h: h.good(Content_Range="bytes 7-9/10"),
    "wrong bytes": _wrong_bytes,
    "wrong checksum": lambda h: h.good(x_goog_hash="md5=AAAAAAAAAAAAAAAAAAAAAA=="),
    "a page": lambda h: _page(h, "text/html; charset=utf-8"),
    "a page as bytes": lambda h: _page(h, "application/octet-stream"),
    "a page of no type": lambda h: _page(h, None),
    "busy": lambda h: h.send_error(h.file.rng.choice([500, 502, 503, 504, 429, 408])),
    "refuses": lambda h: h.send_error(h.file.rng.choice([400, 401, 403, 404, 410, 416, 451])),
    "odd status": lambda h: h.head(h.file.rng.choice([204, 206, 299, 304, 418, 999]), b""),
    "circle": lambda h: h.redirect(h.path),
    "slow circle": _slow_circle,
    "redirects": lambda h: h.redirect(f"{h.path}?good"),
    "redirects, dripping": _drip_redirect,
    "redirects, flooding": _flood_redirect,
    "redirects nowhere": lambda h: h.redirect(h.file.rng.choice(NOWHERE)),
}  # fmt: skip


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server, and a downloader with little patience."""
    with (
        Server() as server,
        mock.patch.multiple(download, _TIMEOUT=TIMEOUT, _FLOOR=FLOOR, _PAUSES=PAUSES),
        mock.patch.dict(os.environ, {"no_proxy": "*"}),
    ):
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(url: str, cache: Path, right: bytes) -> str:
    try:
        path = download.resolve(url, cache)
    except UserError as error:
        lines = len(str(error).splitlines())
        return "refused" if lines == 1 else f"wrong: a message of {lines} lines"
    except Exception:
        return f"wrong: {traceback.format_exc()}"
    return "fetched" if path.read_bytes() == right else "wrong: another file"


def trial(server: Server, room: Path, number: int, answers: list[str], seed: str) -> str:
    """What comes of one file, by one process or by two that want it at once."""
    rng = random.Random(seed)
    path, data = f"/{number}.npz", rng.randbytes(SIZE)
    server.files[path] = File(data, answers, rng)
    outcomes: list[str] = []
    with tempfile.TemporaryDirectory(dir=room) as own:
        get = lambda: outcomes.append(fetch(server.url + path, Path(own), data))
        threads = [
            threading.Thread(target=get, daemon=True) for _ in range(rng.choice([1, 1, 2]))
        ]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        for waited, thread in enumerate(threads, 1):
            thread.join(max(0, begun + waited * DEADLINE - time.monotonic()))
            if thread.is_alive():
                return f"wrong: took more than {waited * DEADLINE:.0f} s"
        if left := [p.name for p in Path(own).rglob("*.lock")]:
            return f"wrong: {left[0]} is left"
    return max(outcomes)  # "wrong" comes last


def run(room: Path, trials: int, seed: int) -> list[Outcome]:
    drawn = []
    for number in range(trials):
        rng = random.Random(f"{seed}/{number}")
        drawn.append(rng.choices(list(ANSWERS), k=rng.randint(1, 4)))
    with serving() as server, ThreadPoolExecutor(AT_ONCE) as pool:
        make = lambda i: trial(server, room, i, list(drawn[i]), f"{seed}/{i}")
        outcomes = list(pool.map(make, range(trials)))
    return [Outcome(", ".join(answers), x) for answers, x in zip(drawn, outcomes, strict=True)]
