"""Every kind of name against a bucket and a hub that live in a thread on this machine."""

import base64
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vit_jax.interop import download
from vit_jax.interop.download import resolve
from vit_jax.system import lock
from vit_jax.system.cache import folder as cache_folder
from vit_jax.system.errors import UserError

BYTES = bytes(range(256)) * 2000  # 512 kB: several reads, and no two windows alike in phase
B16 = "/vit_models/imagenet21k/ViT-B_16.npz"
HUB = "/google/vit-base-patch16-224/resolve/main"


@dataclass
class File:
    """One file of the fake server; `cuts` are the bytes sent before each early hang-up."""

    data: bytes
    etag: str | None = None
    headers: list[tuple[str, str]] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    claimed: int | None = None
    location: str | None = None
    ranges: bool = True
    heeds_if_range: bool = True
    pause: float = 0
    drip: float = 0  # seconds between single bytes
    length: bool = True
    hang: float = 0


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, File] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.watched = None  # a path that must not exist while anything is being sent
        self.seen_early = False

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is part of the play

    def paths(self):
        return [path for path, _ in self.requests]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        file = self.server.files.get(self.path)
        if file is None:
            return self.send_error(404)
        time.sleep(file.hang)
        if file.statuses:
            return self.send_error(file.statuses.pop(0))
        return self.redirect(file) if file.location else self.send(file)

    def redirect(self, file):
        self.send_response(302)
        self.send_header("Location", file.location)
        self.finish_headers(file)

    def finish_headers(self, file):
        for name, value in file.headers:
            self.send_header(name, value)
        self.end_headers()

    def send(self, file):
        start = self.first_byte(file)
        if start >= len(file.data) > 0:
            return self.send_error(416)
        body = file.data[start:]
        self.send_response(206 if start else 200)
        if start:
            last = f"{len(file.data) - 1}/{len(file.data)}"
            self.send_header("Content-Range", f"bytes {start}-{last}")
        if file.length:
            self.send_header("Content-Length", str(file.claimed or len(body)))
        if file.etag:
            self.send_header("ETag", file.etag)
        self.finish_headers(file)
        body = body[: file.cuts.pop(0)] if file.cuts else body
        for at in range(len(body) if file.drip else 0):
            self.wfile.write(body[at : at + 1])
            time.sleep(file.drip)
        for at in range(0, len(body), 100_000):
            self.wfile.write(body[at : at + 100_000])
            time.sleep(file.pause)
            if self.server.watched is not None and self.server.watched.exists():
                self.server.seen_early = True
        return None

    def first_byte(self, file):
        wanted, valid = self.headers.get("Range"), self.headers.get("If-Range")
        if not wanted or not file.ranges or (file.heeds_if_range and valid != file.etag):
            return 0
        return int(wanted.removeprefix("bytes=").removesuffix("-"))


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "_PAUSES", (0.0, 0.0, 0.0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setenv("VIT_JAX_GCS_URL", server.url)
        monkeypatch.setenv("VIT_JAX_HF_URL", server.url + "/")
        monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def refusal(name, cache=None):
    """The message with which `name` is refused: one line, one sentence."""
    with pytest.raises(UserError) as caught:
        resolve(name, cache)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def md5(data):
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def visible(folder):
    """The files of a folder but the records of what was fetched."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def leftovers(cache):
    return [
        path.name for path in cache.rglob("*") if path.suffix in (".part", ".etag", ".lock")
    ]


# --- Names -------------------------------------------------------------------------------


def test_what_exists_is_returned_as_it_is(tmp_path, monkeypatch, server):
    (tmp_path / "my.npz").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)
    assert str(resolve("my.npz")) == "my.npz"
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/my.npz") == tmp_path / "my.npz"
    assert not server.requests


@pytest.mark.parametrize("name", ["gone/my.npz", "", "C:\\my.npz", "ftp://host/x", "a\0b"])
def test_a_path_that_does_not_exist(name, server):
    assert "there is no file or folder" in refusal(name)
    assert not server.requests


@pytest.mark.parametrize(
    ("name", "requested", "stored"),
    [
        ("google:ViT-B_16", B16, B16),
        ("google:ViT-B_16.npz", B16, B16),
        (
            "google:imagenet21k+imagenet2012/ViT-B_16-224",
            "/vit_models/imagenet21k%2Bimagenet2012/ViT-B_16-224.npz",
            "/vit_models/imagenet21k+imagenet2012/ViT-B_16-224.npz",
        ),
        (
            "google:R50+ViT-B_16",
            "/vit_models/imagenet21k/R50%2BViT-B_16.npz",
            "/vit_models/imagenet21k/R50+ViT-B_16.npz",
        ),
        *[
            (f"google:{folder}/{model}", *[f"/{bucket}/{folder}/{model}.npz"] * 2)
            for bucket, folder, model in [
                ("vit_models", "sam", "ViT-B_32"),
                ("vit_models", "gsam", "ViT-S_32"),
                ("mixer_models", "imagenet1k", "Mixer-L_16"),
                ("mixer_models", "sam", "Mixer-B_16"),
            ]
        ],
        ("google:Mixer-B_16", *["/mixer_models/imagenet21k/Mixer-B_16.npz"] * 2),
    ],
)
def test_google_names(name, requested, stored, server, cache):
    server.files[requested] = File(BYTES)
    path = resolve(name)
    assert path == cache / stored[1:]
    assert path.read_bytes() == BYTES
    assert server.paths() == [requested]
    assert not leftovers(cache)


@pytest.mark.parametrize(
    "name",
    [
        "google:", "google:../../x", "google:/etc/passwd", "google:imagenet21k/..",
        "google:private/ViT-B_16", "google:ViT-B/16", "google:imagenet21k/ViT B",
        "augreg:", "augreg:../B_16-x", "augreg:/B-16", "augreg:B_16-i21k/../x", "augreg:-",
        "hf:", "hf:vit", "hf:a/b/c", "hf:../b", "hf:a/..", "hf:/a/b", "hf:a/b@", "hf:a/b@../c",
        "hf:a/b@c/../d", "hf:a/b@/c", "hf:a/.b", "hf:a/b?c", "hf:a/b\n",
        "http:", "http:x", "http://127.0.0.1:port/x", "https://", "http://[", "http:///x",
    ],
)  # fmt: skip
def test_malformed_names_are_refused_without_a_request(name, server, cache):
    server.files["/vit_models/augreg/index.csv"] = File(index([("B/16", "B_16-x", "i21k", 1)]))
    refusal(name)
    assert set(server.paths()) <= {"/vit_models/augreg/index.csv"}
    assert not [path for path in cache.rglob("*") if path.suffix == ".npz"]


def test_any_url(server, cache):
    server.files["/a/my%20model.npz"] = File(b"1")
    server.files["/b/my%20model.npz?x=1"] = File(b"2")
    server.files["/"] = File(b"3")
    first = resolve(server.url + "/a/my model.npz")
    second = resolve(server.url + "/b/my%20model.npz?x=1#part")
    third = resolve(server.url + "/")
    assert [path.read_bytes() for path in (first, second, third)] == [b"1", b"2", b"3"]
    assert first.name == second.name == "my_model.npz"
    assert all(path.is_relative_to(cache) for path in (first, second, third))


@pytest.mark.parametrize("tail", ["/..", "/%2e%2e%2fx", "/a/..%2f..%2fx", "/%00", "/.hidden"])
def test_no_url_leaves_the_cache(tail, server, cache):
    server.files[tail] = File(b"1")
    path = resolve(server.url + tail)
    assert path.resolve().is_relative_to(cache.resolve())
    assert path.is_file()


def index(rows, columns=("name", "filename", "ds", "final_val")):
    text = io.StringIO()
    csv.writer(text).writerows([columns, *rows])
    return text.getvalue().encode()


AUGREG = [
    ("B/16", "B_16-i21k-300ep-aug_none", "i21k", 0.40),
    ("B/16", "B_16-i21k-300ep-aug_medium1", "i21k", 0.47),
    ("B/16", "B_16-i21k-300ep-aug_medium1", "i21k", 0.47),  # one row for each fine-tuning
    ("B/16", "B_16-i21k-300ep-aug_light1", "i21k", "nan"),
    ("B/16", "B_16-i21k-300ep-aug_light0", "i21k", ""),
    ("B/16", "B_16-i21k_30-30ep", "i21k_30", 0.9),
    ("B/16", "B_16-i1k-300ep", "i1k", 0.8),
    ("R26+S/32", "R26_S_32-i21k-300ep", "i21k", 0.5),
    ("Ti/16", "../../Ti_16-evil", "i21k", 0.5),
]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("B_16", "B_16-i21k-300ep-aug_medium1"),
        ("B/16", "B_16-i21k-300ep-aug_medium1"),
        ("R26+S/32", "R26_S_32-i21k-300ep"),
    ],
)
def test_augreg_picks_the_best_upstream_run(name, stem, server, cache):
    server.files["/vit_models/augreg/index.csv"] = File(index(AUGREG))
    server.files[f"/vit_models/augreg/{stem}.npz"] = File(BYTES)
    assert resolve(f"augreg:{name}") == cache / f"vit_models/augreg/{stem}.npz"
    resolve(f"augreg:{name}")
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("augreg:B16", "augreg:B_16"),
        ("augreg:b_16", "augreg:B_16"),
        ("augreg:ViT-B_16", "augreg:B_16"),
        ("augreg:R26-S_32", "augreg:R26_S_32"),
        ("google:ViT-B16", "google:ViT-B_16"),
        ("google:imagenet21k/B_16.npz", "google:imagenet21k/ViT-B_16"),
        ("google:R50-ViT-B_16", "google:R50+ViT-B_16"),
    ],
)
def test_a_name_that_was_meant_otherwise_is_told_without_a_network(name, meant, server):
    assert refusal(name).endswith(f"write {meant}.")
    assert server.paths() == []


def test_augreg_full_name_needs_no_index(server):
    stem = "B_16-i21k-300ep-lr_0.001-wd_0.1--imagenet2012-steps_20k-lr_0.03-res_384"
    server.files[f"/vit_models/augreg/{stem}.npz"] = File(BYTES)
    assert resolve(f"augreg:{stem}") == resolve(f"augreg:{stem}.npz")
    assert server.paths() == [f"/vit_models/augreg/{stem}.npz"]


def test_augreg_unknown_model_and_a_hostile_index(server):
    server.files["/vit_models/augreg/index.csv"] = File(index(AUGREG))
    assert "B_16, R26_S_32" in refusal("augreg:B_17")
    with pytest.raises(UserError, match="AugReg has no model 'Ti_16'"):
        resolve("augreg:Ti_16")
    evil = [("x", "Ti_16-/../../evil", "i21k", 1)]
    index_path = cache_folder() / "vit_models/augreg/index.csv"
    index_path.write_bytes(index(evil))
    index_path.with_name(".index.csv.fetched").unlink()  # as if it had been put there by hand
    assert "without its folder" in refusal("augreg:Ti_16")


@pytest.mark.parametrize(
    "content", [b"<html>", b"name,ds\nB/16,i21k\n", b"\xff\xfe\x00", index([("a", "b-c")]),
                index([("a", "B_16-x", "i21k", "high")])],
)  # fmt: skip
def test_an_index_that_is_none(content, server):
    server.files["/vit_models/augreg/index.csv"] = File(content)
    assert "index.csv" in refusal("augreg:B_16")


def hub(server, folder=HUB, **weights):
    server.files[f"{folder}/config.json"] = File(b"{}", '"' + "0" * 40 + '"')
    server.files[f"{folder}/model.safetensors"] = File(BYTES, **weights)


def test_huggingface_folder(server, cache):
    hub(server)
    folder = resolve("hf:google/vit-base-patch16-224")
    assert folder == cache / "huggingface/google/vit-base-patch16-224/main"
    assert visible(folder) == ["config.json", "model.safetensors"]
    asked = len(server.requests)
    assert resolve("hf:google/vit-base-patch16-224") == folder
    assert len(server.requests) == asked == 3


def test_huggingface_revision_and_preprocessor(server, cache):
    hub(server, "/a/b/resolve/refs%2Fpr%2F1")
    server.files["/a/b/resolve/refs%2Fpr%2F1/preprocessor_config.json"] = File(b"{}")
    folder = resolve("hf:a/b@refs/pr/1")
    assert len(visible(folder)) == 3
    assert folder.parent == cache / "huggingface/a/b"


def test_huggingface_without_safetensors(server):
    hub(server)
    del server.files[f"{HUB}/model.safetensors"]
    assert "has no safetensors weights" in refusal("hf:google/vit-base-patch16-224")


def test_huggingface_weights_in_several_files(server, cache):
    server.files[f"{HUB}/config.json"] = File(b"{}")
    shards = {
        "a": "model-1.safetensors",
        "b": "model-2.safetensors",
        "c": "model-1.safetensors",
    }
    index = File(json.dumps({"weight_map": shards}).encode())
    server.files[f"{HUB}/model.safetensors.index.json"] = index
    server.files[f"{HUB}/model-1.safetensors"] = File(BYTES)
    name = "hf:google/vit-base-patch16-224"
    assert "there is no file" in refusal(name)  # the second is missing
    server.files[f"{HUB}/model-2.safetensors"] = File(BYTES[:1000])
    folder = resolve(name)
    assert visible(folder) == [
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
    ]
    asked = len(server.requests)
    assert resolve(name) == folder
    assert len(server.requests) == asked
    assert server.paths().count(f"{HUB}/model-1.safetensors") == 1


@pytest.mark.parametrize(
    "index", [b"{}", b"[", b'{"weight_map": {"a": "../b"}}', b'{"weight_map": {"a": 3}}']
)
def test_huggingface_index_that_is_none(index, server):
    server.files[f"{HUB}/config.json"] = File(b"{}")
    server.files[f"{HUB}/model.safetensors.index.json"] = File(index)
    assert "is no index of weights" in refusal("hf:google/vit-base-patch16-224")


def test_the_token_goes_to_the_hub_and_no_further(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub(server)
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    server.files[f"{HUB}/model.safetensors"] = File(b"", location=f"{elsewhere}/blob")
    server.files["/blob"] = File(BYTES)
    resolve("hf:google/vit-base-patch16-224")
    sent = {path: headers.get("Authorization") for path, headers in server.requests}
    assert sent[f"{HUB}/config.json"] == sent[f"{HUB}/model.safetensors"] == "Bearer secret"
    assert sent["/blob"] is None
    monkeypatch.setenv("VIT_JAX_HF_URL", elsewhere)
    server.files["/w.npz"] = File(BYTES)
    resolve(f"{server.url}/w.npz")
    assert server.requests[-1][1].get("Authorization") is None


def test_huggingface_failures_other_than_404_are_not_taken_for_absence(server):
    hub(server)
    server.files[f"{HUB}/preprocessor_config.json"] = File(b"", statuses=[403])
    assert "HTTP 403" in refusal("hf:google/vit-base-patch16-224")


@pytest.mark.parametrize("right", [True, False])
def test_huggingface_sha256_of_the_redirect(right, server, cache):
    """The storage behind the hub has an ETag that looks like a SHA-256 and is none."""
    hub(server, location="/storage/1")
    linked = sha256(BYTES if right else b"other")
    server.files[f"{HUB}/model.safetensors"].headers = [("X-Linked-Etag", f'"{linked}"')]
    server.files["/storage/1"] = File(BYTES, etag=f'"{sha256(b"xet")}"')
    if right:
        folder = resolve("hf:google/vit-base-patch16-224")
        assert (folder / "model.safetensors").read_bytes() == BYTES
    else:
        message = refusal("hf:google/vit-base-patch16-224")
        assert linked in message
        assert sha256(BYTES) in message
        assert not list(cache.rglob("model.safetensors*"))


# --- Fetching ----------------------------------------------------------------------------


@pytest.mark.parametrize("right", [True, False])
def test_google_md5(right, server, cache):
    """Google sends two headers of that name, with a CRC in the other."""
    value = md5(BYTES if right else b"other")
    headers = [("x-goog-hash", "crc32c=AAAAAA=="), ("x-goog-hash", f"md5={value}")]
    server.files[B16] = File(BYTES, headers=headers)
    if right:
        assert resolve("google:ViT-B_16").read_bytes() == BYTES
    else:
        assert "is damaged and was removed" in refusal("google:ViT-B_16")
        assert not [path for path in cache.rglob("*") if path.is_file()]


def test_md5_of_what_is_stored_compressed_is_not_ours(server):
    headers = [("x-goog-hash", "md5=" + md5(b"z")), ("x-goog-stored-content-encoding", "gzip")]
    server.files[B16] = File(BYTES, headers=headers)
    assert resolve("google:ViT-B_16").read_bytes() == BYTES


def test_cached_files_are_not_fetched_again(server):
    server.files[B16] = File(BYTES)
    path = resolve("google:ViT-B_16")
    server.files.clear()
    assert resolve("google:ViT-B_16") == path
    assert len(server.requests) == 1


def test_a_cut_connection_is_resumed(server, cache):
    checked = [("x-goog-hash", f"md5={md5(BYTES)}")]
    server.files[B16] = File(BYTES, '"v1"', cuts=[200_000, 150_000], headers=checked)
    server.watched = cache / B16[1:]
    assert resolve("google:ViT-B_16").read_bytes() == BYTES
    sent = [(headers.get("Range"), headers.get("If-Range")) for _, headers in server.requests]
    assert sent == [(None, None), ("bytes=200000-", '"v1"'), ("bytes=350000-", '"v1"')]
    assert not server.seen_early
    assert not leftovers(cache)


def test_a_file_lands_in_one_move(server, cache, monkeypatch):
    server.files[B16] = File(BYTES)
    moves = []

    def move(source, target):
        moves.append((source.read_bytes() == BYTES, target.exists(), target))
        source.rename(target)

    monkeypatch.setattr(download.os, "replace", move)
    path = resolve("google:ViT-B_16")
    assert moves == [(True, False, path)]


def test_tries_count_from_the_last_progress(server):
    server.files[B16] = File(BYTES, '"v1"', cuts=[20_000] * 10)
    assert resolve("google:ViT-B_16").read_bytes() == BYTES


def test_a_later_run_resumes(server, cache):
    server.files[B16] = File(BYTES, '"v1"', cuts=[100_000, 0, 0, 0])
    message = refusal("google:ViT-B_16")
    assert server.url + B16 in message
    assert str(cache / B16[1:]) in message
    assert not (cache / B16[1:]).exists()
    asked = len(server.requests)
    assert resolve("google:ViT-B_16").read_bytes() == BYTES
    assert server.requests[asked][1]["Range"] == "bytes=100000-"


@pytest.mark.parametrize("heeds", [True, False])
def test_a_file_that_changed_is_begun_again(heeds, server):
    """Also where the server ignores If-Range and continues with bytes of the new file."""
    server.files[B16] = File(BYTES, '"v1"', cuts=[100_000, 0, 0, 0])
    refusal("google:ViT-B_16")
    server.files[B16] = File(BYTES[::-1], '"v2"', heeds_if_range=heeds)
    assert resolve("google:ViT-B_16").read_bytes() == BYTES[::-1]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_nothing_is_resumed(etag, server):
    server.files[B16] = File(BYTES, etag, cuts=[100_000], heeds_if_range=False)
    assert resolve("google:ViT-B_16").read_bytes() == BYTES
    assert all("Range" not in headers for _, headers in server.requests)


def test_a_server_without_ranges_sends_it_all_again(server):
    server.files[B16] = File(BYTES, '"v1"', cuts=[100_000], ranges=False)
    assert resolve("google:ViT-B_16").read_bytes() == BYTES


def test_a_leftover_that_is_too_long_is_dropped(server, cache):
    server.files[B16] = File(BYTES, '"v1"')
    part = cache / (B16[1:] + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"0" * (len(BYTES) + 1))
    part.with_name(part.name + ".etag").write_text('"v1"')
    assert resolve("google:ViT-B_16").read_bytes() == BYTES
    assert not leftovers(cache)


def test_a_file_shorter_than_announced_never_lands(server, cache):
    server.files[B16] = File(BYTES, claimed=len(BYTES) + 5)
    message = refusal("google:ViT-B_16")
    assert f"{len(BYTES)} of {len(BYTES) + 5} bytes" in message
    assert not (cache / B16[1:]).exists()


def test_not_found(server, cache):
    assert f"{server.url}{B16} (HTTP 404)" in refusal("google:ViT-B_16")
    assert len(server.requests) == 1
    assert not leftovers(cache)


@pytest.mark.parametrize("status", [401, 403])
def test_forbidden(status, server, cache):
    server.files[B16] = File(BYTES, statuses=[status])
    message = refusal("google:ViT-B_16")
    assert f"HTTP {status}" in message
    assert str(cache / B16[1:]) in message


def test_a_busy_server_is_asked_again(server):
    server.files[B16] = File(BYTES, statuses=[503, 429])
    assert resolve("google:ViT-B_16").read_bytes() == BYTES
    server.files["/x"] = File(BYTES, statuses=[500] * 9)
    assert "HTTP 500" in refusal(server.url + "/x")


@pytest.mark.parametrize("location", ["ftp://127.0.0.1/x", "file:///etc/hostname", "/loop"])
def test_redirects_that_are_refused(location, server, cache):
    server.files["/loop"] = File(b"", location=location)
    assert "HTTP 302" in refusal(server.url + "/loop")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_offline_is_said_at_once(server, cache, monkeypatch):
    monkeypatch.setattr(download, "_PAUSES", (5.0,))
    server.shutdown()
    server.server_close()
    began = time.monotonic()
    message = refusal("google:ViT-B_16")
    assert time.monotonic() - began < 2
    assert message.startswith("cannot reach")
    assert server.url + B16 in message
    assert str(cache / B16[1:]) in message
    (cache / B16[1:]).write_bytes(BYTES)  # as the message says
    assert resolve("google:ViT-B_16").read_bytes() == BYTES


def test_a_silent_server_is_given_up(server, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.1)
    server.files[B16] = File(BYTES, '"v1"', hang=0.3)
    assert "timed out" in refusal("google:ViT-B_16")


def test_a_mirror_must_be_a_url(server, monkeypatch):
    monkeypatch.setenv("VIT_JAX_GCS_URL", "file:///mirror")
    assert "'file:///mirror' is no valid URL" in refusal("google:ViT-B_16")


def test_disk_errors(server, tmp_path, monkeypatch):
    server.files[B16] = File(BYTES)
    (tmp_path / "occupied").write_text("a file")
    assert "cannot write" in refusal("google:ViT-B_16", tmp_path / "occupied")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download.os, "fsync", full)
    assert "No space left" in refusal("google:ViT-B_16")


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("VIT_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/vit_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/vit_jax"
    monkeypatch.setenv("VIT_JAX_CACHE", "~/weights")
    assert cache_folder() == tmp_path / "weights"


def test_threads_at_once_fetch_once(server, cache):
    server.files[B16] = File(BYTES, pause=0.02)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve("google:ViT-B_16").read_bytes()))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [BYTES] * 6
    assert len(server.requests) == 1
    assert not leftovers(cache)


def test_threads_at_once_when_the_first_one_fails(server, cache):
    """The lock of a failed download is removed; those that waited for it take turns still."""
    server.files[B16] = File(BYTES, statuses=[403, 403, 403])
    found, failed = [], []

    def fetch():
        try:
            found.append(resolve("google:ViT-B_16").read_bytes())
        except UserError as error:
            failed.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(failed), found) == (3, [BYTES] * 5)
    assert len(server.requests) == 4
    assert not leftovers(cache)


def test_a_lock_that_was_removed_while_waiting_does_not_count(tmp_path):
    """Else the one who waited for it and the one who holds the new one would both write."""
    path, entered = tmp_path / "x.lock", threading.Event()

    def wait():
        with lock.locked(path, "waiting"):
            entered.set()

    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.2)
        path.unlink()
        newer = lock.locked(path)
        newer.__enter__()
    assert not entered.wait(0.3)
    newer.__exit__(None, None, None)
    waiting.join(10)
    assert entered.is_set()


def test_processes_at_once_fetch_once(server, cache):
    server.files[B16] = File(BYTES, pause=0.1)
    code = "from vit_jax.interop.download import resolve; print(resolve('google:ViT-B_16'))"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    shown = [process.communicate(timeout=60)[0].strip() for process in running]
    assert shown == [str(cache / B16[1:])] * 2
    assert len(server.requests) == 1


# --- What the cache holds, and what servers leave out --------------------------------------


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(server, cache, capsys, how):
    server.files[B16] = File(BYTES)
    path = resolve("google:ViT-B_16")
    damaged = BYTES[:1000] if how == "cut" else b"x" + BYTES[1:]
    path.write_bytes(damaged)
    assert resolve("google:ViT-B_16").read_bytes() == BYTES
    assert path.with_name("ViT-B_16.npz.damaged").read_bytes() == damaged
    assert "is no longer what was fetched" in capsys.readouterr().err
    assert len(server.requests) == 2
    resolve("google:ViT-B_16")
    assert len(server.requests) == 2


def test_a_model_of_the_hub_is_whole_or_completed(server):
    hub(server)
    folder = resolve("hf:google/vit-base-patch16-224")
    (folder / "model.safetensors").write_bytes(b"short")
    resolve("hf:google/vit-base-patch16-224")
    assert (folder / "model.safetensors").read_bytes() == BYTES


def test_a_file_that_somebody_put_there_is_taken(server, cache):
    path = cache / B16[1:]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    assert resolve("google:ViT-B_16").read_bytes() == b"mine"
    assert not server.requests


def test_without_a_length_a_cut_could_not_be_told(server, cache):
    server.files[B16] = File(BYTES, length=False, cuts=[1000])
    assert "does not say how long" in refusal("google:ViT-B_16")
    assert not (cache / B16[1:]).exists()
    header = [("x-goog-hash", f"md5={md5(BYTES)}")]
    server.files[B16] = File(BYTES, headers=header, length=False, cuts=[1000])
    assert "is damaged and was removed" in refusal("google:ViT-B_16")
    assert resolve("google:ViT-B_16").read_bytes() == BYTES


def test_a_server_that_sends_a_byte_now_and_then_is_given_up(server, cache, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.3)
    monkeypatch.setattr(download, "_PAUSES", (0.01,))
    server.files[B16] = File(BYTES, '"v1"', drip=0.05)
    begin = time.monotonic()
    assert "breaks off again and again" in refusal("google:ViT-B_16")
    assert time.monotonic() - begin < 5
    assert not list(cache.rglob("*.lock"))
