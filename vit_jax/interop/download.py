"""Names of published weights, resolved to files on this machine.

    checkpoints/my.npz, some/folder     what is already here, returned as it is
    google:ViT-B_16                     the original weights, pre-trained on ImageNet-21k
    google:imagenet21k+imagenet2012/ViT-B_16    another folder of Google's bucket
    google:Mixer-B_16                   MLP-Mixer
    augreg:B_16                         the best AugReg pre-training run of that model
    augreg:B_16-i21k-300ep-lr_...       one AugReg file by its full name
    hf:owner/name, hf:owner/name@v1.0   a Hugging Face model (a folder), at a revision
    https://...                         any file

A download stays in a cache folder and is not fetched again; delete the file to renew it, for
example when a branch of a Hugging Face model has changed. Its size and SHA-256 are stored
beside it, in .NAME.fetched, and compared when it is used: a file that was damaged since is
moved aside and fetched again. A file that you put there yourself is used unchecked. Nothing in
the files is executed. Three environment variables change the locations:

    VIT_JAX_CACHE      the cache folder, see vit_jax/system/cache.py
    VIT_JAX_GCS_URL    a mirror of Google's buckets, else https://storage.googleapis.com
    VIT_JAX_HF_URL     a mirror of the hub, else https://huggingface.co

HF_TOKEN, the hub's own variable, is sent to the hub (and nowhere that it redirects to), for
models that are private or ask for consent.
"""

import base64
import contextlib
import csv
import hashlib
import http.client
import json
import math
import os
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urldefrag, urlsplit

from tqdm import tqdm

from vit_jax import __version__
from vit_jax.system import bounded, lock
from vit_jax.system.cache import folder as cache_folder
from vit_jax.system.errors import UserError

_HOSTS = {
    "VIT_JAX_GCS_URL": "https://storage.googleapis.com",
    "VIT_JAX_HF_URL": "https://huggingface.co",
}
_GOOGLE_FOLDERS = {
    "vit_models": ("imagenet21k", "imagenet21k+imagenet2012", "sam", "gsam"),
    "mixer_models": ("imagenet21k", "imagenet1k", "sam"),
}

# Models of each kind, to see without a network that a name was meant otherwise. Others may be
# published: only a name that differs in its punctuation is refused.
_MODELS = {
    "augreg": (
        "Ti_16", "S_32", "S_16", "B_32", "B_16", "B_8", "L_16",
        "R_Ti_16", "R26_S_32", "R50_L_32",
    ),
    "google": (
        "ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14", "R50+ViT-B_16",
        "Mixer-B_16", "Mixer-L_16",
    ),
}  # fmt: skip

# One step of a path: no slash, and no dot in front, so that no name leaves the cache.
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_REPOSITORY = re.compile(rf"({_WORD}/{_WORD})(?:@({_WORD}(?:/{_WORD})*))?")

# A server that sends nothing useful is abandoned after five tries, each of which takes at most
# six times _TIMEOUT: to connect, for redirects and the head of the answer, for bytes too few.
# Others, who wait for the lock, wait no longer.
_TIMEOUT = 10.0  # seconds without an answer, or without one more byte
_FLOOR = 1024  # bytes a second; a server that sends fewer in _TIMEOUT counts as silent
_PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before each new try of a connection that was cut


# --- Names -------------------------------------------------------------------------------


def resolve(name: str, cache: Path | None = None) -> Path:
    """The file or folder that `name` stands for, fetched into `cache` where it is not here.

    A name that exists as a path is that path. The module describes the other kinds of names and
    the default of `cache`. A file appears in the cache complete and verified, or not at all.

    Raises:
      UserError: the name is malformed, or exists neither here nor on the server; the server
        cannot be reached; the download is damaged; or the cache cannot be written.
    """
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return Path(path)
    kind, separator, rest = name.partition(":")
    if not separator or kind not in _KINDS:
        raise UserError(
            f"there is no file or folder {name!r}: give a path that exists, a URL, "
            "google:NAME, augreg:NAME or hf:OWNER/NAME."
        )
    _check_spelling(kind, rest)
    cache = (cache or cache_folder()).absolute()
    return _KINDS[kind](name if kind.startswith("http") else rest, cache)


def _check_spelling(kind: str, name: str) -> None:
    """Refuses `augreg:B16` for `augreg:B_16`, and the like, before anything is fetched.

    Raises:
      UserError: naming the model that was meant.
    """
    plain = lambda text: re.sub(r"[^a-z0-9]|vit", "", text.lower())
    folder, slash, model = name.removesuffix(".npz").rpartition("/")
    if kind == "augreg":  # where the paper's R26+S/32 is a name, too
        folder, slash, model = "", "", re.sub("[/+]", "_", name.removesuffix(".npz"))
    for known in _MODELS.get(kind, ()):
        if plain(known) == plain(model) and known != model:
            meant = f"{kind}:{folder}{slash}{known}"
            raise UserError(f"{f'{kind}:{name}'!r} is no name of weights: write {meant}.")


def _host(variable: str) -> str:
    return _valid(os.environ.get(variable) or _HOSTS[variable]).rstrip("/")


def _valid(url: str) -> str:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            # Characters that a URL may not hold are encoded; what is encoded already stays.
            return quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    except ValueError:
        pass
    raise UserError(f"{url!r} is no valid URL: write http:// or https://, a host and a path.")


def _google(name: str, cache: Path) -> Path:
    folder, _, model = name.removesuffix(".npz").rpartition("/")
    bucket = "mixer_models" if model.startswith("Mixer-") else "vit_models"
    folder = folder or "imagenet21k"
    if folder not in _GOOGLE_FOLDERS[bucket] or not re.fullmatch(_WORD, model):
        raise UserError(
            f"{'google:' + name!r} is no name of Google's weights: write google:MODEL or "
            "google:FOLDER/MODEL, such as google:ViT-B_16, where FOLDER is one of "
            f"{', '.join(_GOOGLE_FOLDERS[bucket])}."
        )
    return _from_bucket(f"{bucket}/{folder}/{model}.npz", cache)


def _augreg(name: str, cache: Path) -> Path:
    # Upstream's convention, too: only the name of a file, never that of a model, has a dash.
    if "-" not in name:
        model = name.replace("/", "_").replace("+", "_")  # the paper writes R26+S/32
        name = _best_augreg(model, _from_bucket("vit_models/augreg/index.csv", cache))
    stem = name.removesuffix(".npz")
    if not re.fullmatch(_WORD, stem):
        raise UserError(
            f"{'augreg:' + name!r} is no name of AugReg weights: write augreg:MODEL, such as "
            "augreg:B_16, or the full name of a file without its folder."
        )
    return _from_bucket(f"vit_models/augreg/{stem}.npz", cache)


def _best_augreg(model: str, index: Path) -> str:
    """The pre-training run with the highest final accuracy on held-out ImageNet-21k.

    That is `final_val` among the 300-epoch runs on ImageNet-21k (`ds` is i21k), Google's own
    choice. `best_val`, the peak during the run, may belong to weights that were not kept, and
    accuracies after fine-tuning would pick a run by the task that it is then tested on.
    """
    try:
        with index.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["ds"] == "i21k"]
        # A run has a row for each of its fine-tunings, and no score where it failed.
        runs = {(float(row["final_val"] or "nan"), row["filename"]) for row in rows}
        runs = {(score, file) for score, file in runs if math.isfinite(score)}
        best = {file.split("-")[0]: (file, score) for score, file in sorted(runs)}
        if not best:
            raise ValueError("it has no runs on i21k")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(
            f"{index} is no index of AugReg weights ({error!r}); delete it to fetch it again."
        ) from error
    if model not in best:
        raise UserError(
            f"AugReg has no model {model!r}: write augreg: and one of "
            f"{', '.join(sorted(best))}."
        )
    name, score = best[model]
    print(f"augreg:{model} is {name} (upstream accuracy {score:.4f})", file=sys.stderr)
    return name


def _from_bucket(key: str, cache: Path) -> Path:
    # The plus of imagenet21k+imagenet2012 would be read as a space if it were not encoded.
    return _fetch(f"{_host('VIT_JAX_GCS_URL')}/{quote(key)}", cache / key)


def _huggingface(name: str, cache: Path) -> Path:
    match = _REPOSITORY.fullmatch(name)
    if match is None:
        raise UserError(
            f"{'hf:' + name!r} is no name of a Hugging Face model: write hf:OWNER/NAME or "
            "hf:OWNER/NAME@REVISION, such as hf:google/vit-base-patch16-224."
        )
    repository, revision = match[1], quote(match[2] or "main", safe="")
    folder = cache / "huggingface" / repository / revision
    config, weights = folder / "config.json", folder / "model.safetensors"
    index = _beside(weights, ".index.json")
    if _is_whole(config) and (_is_whole(weights) or _shards_are_whole(index)):
        return folder  # without another request for the optional file
    url = f"{_host('VIT_JAX_HF_URL')}/{quote(repository)}/resolve/{revision}"
    _fetch(f"{url}/config.json", config)
    with contextlib.suppress(_NotFound):
        _fetch(f"{url}/preprocessor_config.json", folder / "preprocessor_config.json")
    try:
        _fetch(f"{url}/model.safetensors", weights)
    except _NotFound:
        _shards(url, name, folder, index)
    return folder


def _shards(url: str, name: str, folder: Path, index: Path) -> None:
    """Fetches weights that are cut into several files, their index last: it says "complete"."""
    part = index.with_name("shards.json")
    try:
        _fetch(f"{url}/{index.name}", part)
    except _NotFound as error:
        raise UserError(
            f"the repository hf:{name} has no safetensors weights (there is neither "
            f"{url}/model.safetensors nor {url}/{index.name}); choose a model or a revision "
            f"that has them."
        ) from error
    try:
        shards = sorted(set(bounded.parse_json(bounded.read(part))["weight_map"].values()))
        if not all(re.fullmatch(_WORD, shard) for shard in shards):
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        part.unlink()
        raise UserError(
            f"{url}/{index.name} is no index of weights; choose another revision."
        ) from error
    for shard in shards:
        _fetch(f"{url}/{shard}", folder / shard)
    os.replace(_fetched(part), _fetched(index))
    os.replace(part, index)


def _shards_are_whole(index: Path) -> bool:
    """Whether the index and all that it names are there as they were fetched."""
    if not _is_whole(index):
        return False
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        shards = set(bounded.parse_json(bounded.read(index))["weight_map"].values())
        return all(_is_whole(index.with_name(shard)) for shard in shards)
    return True  # put there by the user: its reader reports what is wrong with it


def _web(url: str, cache: Path) -> Path:
    url = urldefrag(_valid(url)).url
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    name = re.sub(r"[^A-Za-z0-9_.+-]", "_", name)[-100:].lstrip(".") or "file"
    # Readers go by the suffix, so the name stays; the digest keeps equal names apart.
    return _fetch(url, cache / "web" / hashlib.sha256(url.encode()).hexdigest()[:16] / name)


_KINDS: dict[str, Callable[[str, Path], Path]] = {
    "google": _google,
    "augreg": _augreg,
    "hf": _huggingface,
    "http": _web,
    "https": _web,
}


# --- Fetching one file -------------------------------------------------------------------


class _NotFound(UserError):
    """The server answers, but does not have the file."""


class _Cut(Exception):
    """The connection broke; one more try may complete the file."""


class _Slow(_Cut):
    """The server sends too few bytes to finish."""


class _Unreachable(_Cut):
    """There was no connection in the first place."""


def _fetch(url: str, path: Path) -> Path:
    """Downloads `url` to `path` unless it is there. Raises UserError, as `resolve` does."""
    try:
        if _is_whole(path):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process to fetch {path}"
        with lock.locked(_beside(path, ".lock"), waiting):
            if not path.is_file():  # another process may have fetched it meanwhile
                _download(url, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); make room or get permission, "
            "or set VIT_JAX_CACHE to another folder."
        ) from error
    return path


def _is_whole(path: Path) -> bool:
    """Whether the file is there, and as it was when it was fetched; else it is moved aside."""
    if not path.is_file():
        return False
    fetched = _fetched(path)
    try:
        known = bounded.parse_json(bounded.read(fetched))
        size, digest = int(known["size"]), str(known["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        return True  # put there by the user, or by a version that kept no record
    found = path.stat().st_size
    if found == size and _sha256(path) == digest:
        return True
    aside = _beside(path, ".damaged")
    with contextlib.suppress(FileNotFoundError):  # another process has moved it already
        os.replace(path, aside)
    fetched.unlink(missing_ok=True)
    how = f"it has {found:,} of {size:,} bytes" if found != size else "its SHA-256 is another"
    print(
        f"warning: {path} is no longer what was fetched ({how}): moved to {aside.name}, "
        "fetching it again",
        file=sys.stderr,
    )
    return False


def _fetched(path: Path) -> Path:
    """Where the size and the digest of a file are kept."""
    return path.with_name(f".{path.name}.fetched")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _download(url: str, path: Path) -> None:
    part = _beside(path, ".part")
    failures, most, first, since = 0, -1, True, time.monotonic()
    while True:
        try:
            checksum = _attempt(url, path, part)
            break
        except _Cut as cut:
            if first and isinstance(cut, _Unreachable):
                raise UserError(
                    f"cannot reach {url} ({cut}); go online, or put the file at {path}."
                ) from cut
            first = False
            # Tries count from the last progress: a bad connection must not stop a large file.
            # But one byte a try is no progress, or others would wait for the lock for ever.
            size = part.stat().st_size if part.exists() else 0
            enough = size - max(most, 0) >= _FLOOR * (time.monotonic() - since)
            if size > most and enough and not isinstance(cut, _Slow):
                failures, most, since = 0, size, time.monotonic()
            failures += 1
            if failures > len(_PAUSES):
                raise UserError(
                    f"the download of {url} breaks off again and again ({cut}); run this "
                    f"again later to continue it, or put the file at {path}."
                ) from cut
            time.sleep(_PAUSES[failures - 1])
    _verify(part, checksum, url)
    record = {"url": url, "size": part.stat().st_size, "sha256": _sha256(part)}
    _fetched(path).write_text(json.dumps(record) + "\n")  # first: without the file it is void
    os.replace(part, path)
    _beside(part, ".etag").unlink(missing_ok=True)


def _attempt(url: str, path: Path, part: Path) -> tuple[str, str] | None:
    """One request that begins or continues `part`; returns the checksum, where one is known.

    Raises _Cut where another try may help, UserError where none does.
    """
    start, etag = _kept(part)
    answer, headers = _open(url, path, start, etag)
    with answer:
        if answer.status not in (200, 206):
            raise UserError(
                f"the server answers {url} with HTTP {answer.status}, not with a file; fetch "
                f"it by other means, and put it at {path}."
            )
        _check_no_page(answer.headers.get_content_type() == "text/html", url, path)
        if answer.status == 206 and not _continues(answer, start, etag):
            _forget(part)
            raise _Cut("the file on the server has changed")
        if answer.status != 206:
            start = 0
            _begin(part, answer.headers.get("ETag", ""))
        total = None if answer.length is None else start + answer.length
        checksum = _checksum(headers)
        if total is None and not answer.chunked and checksum is None:
            raise UserError(
                f"the server does not say how long {url} is, so that one could not tell "
                f"whether all of it has arrived; fetch it by other means, and put it at {path}."
            )
        with (
            part.open("ab") as file,
            tqdm(
                total=total, initial=start, desc=path.name, unit="B", unit_scale=True,
                disable=None,  # shown on a terminal only
            ) as bar,
        ):  # fmt: skip
            pace = _Pace()
            while chunk := _read(answer):
                _check_no_page(file.tell() == 0 and _PAGE.match(chunk) is not None, url, path)
                file.write(chunk)
                bar.update(len(chunk))
                pace.check(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    size = part.stat().st_size
    if total is not None and size != total:
        raise _Cut(f"{size} of {total} bytes arrived")
    return checksum


_PAGE = re.compile(rb"\s*<(?:!doctype\s+html|html)\b", re.IGNORECASE)


def _check_no_page(is_page: bool, url: str, path: Path) -> None:
    """Raises UserError for the login page of a network."""
    if is_page:
        raise UserError(
            f"the server answers {url} with a web page, not with a file: see in a browser what "
            f"it says, or put the file at {path}."
        )


class _Pace:
    """Finds a server that sends so little that others, who wait for the lock, wait for ever."""

    def __init__(self) -> None:
        self._began, self._bytes = time.monotonic(), 0

    def check(self, size: int) -> None:
        """Raises _Slow if less than `_FLOOR` bytes a second came in the last `_TIMEOUT`."""
        self._bytes += size
        seconds = time.monotonic() - self._began
        if seconds >= _TIMEOUT:
            if self._bytes < _FLOOR * seconds:
                raise _Slow(f"{self._bytes} bytes arrived in {seconds:.0f} s")
            self._began, self._bytes = time.monotonic(), 0


def _kept(part: Path) -> tuple[int, str]:
    """How many bytes an earlier try left, and the ETag of the file that they belong to."""
    etag = _beside(part, ".etag")
    if not (part.is_file() and etag.is_file()):
        return 0, ""  # without an ETag the file may have changed since: begin again
    return part.stat().st_size, etag.read_text(encoding="latin-1").strip()


def _begin(part: Path, etag: str) -> None:
    _forget(part)
    if etag.startswith('"'):  # W/"..." is weak: equal for files whose bytes differ
        _beside(part, ".etag").write_text(etag, encoding="latin-1")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _beside(part, ".etag").unlink(missing_ok=True)


def _continues(answer: http.client.HTTPResponse, start: int, etag: str) -> bool:
    # Not every server heeds If-Range (Google's documents do not name it), so look again.
    same = bool(etag) and answer.headers.get("ETag") == etag
    return same and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read1(1 << 20)
    except (http.client.HTTPException, OSError) as error:
        raise _Cut(_why(error)) from error


def _checksum(answers: list[Message]) -> tuple[str, str] | None:
    """The kind and value of the checksum in the headers of a redirect or the last answer."""
    for headers in answers:
        # The hub names the SHA-256 of a large file when it redirects. The ETag of the server
        # that it redirects to looks the same but is another number, so it does not count.
        linked = headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
        if re.fullmatch("[0-9a-f]{64}", linked):
            return "sha256", linked
    # A file that is stored compressed is unpacked on the way, and the hash is not of that.
    if answers[-1].get("x-goog-stored-content-encoding", "identity") == "identity":
        for value in ",".join(answers[-1].get_all("x-goog-hash", [])).split(","):
            if value.strip().startswith("md5="):
                return "md5", value.strip().removeprefix("md5=")
    return None


def _verify(part: Path, checksum: tuple[str, str] | None, url: str) -> None:
    if checksum is None:
        return
    kind, expected = checksum
    with part.open("rb") as file:
        # MD5 guards against accidents here; systems that forbid it for security allow that.
        found = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False))
    if expected not in (found.hexdigest(), base64.b64encode(found.digest()).decode()):
        _forget(part)
        raise UserError(
            f"the download of {url} is damaged and was removed (its {kind} is "
            f"{found.hexdigest()}, but the server announced {expected}); run this again."
        )


# --- One request -------------------------------------------------------------------------


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the headers that came with them."""

    def __init__(self) -> None:
        self.headers: list[Message] = []
        self._end = time.monotonic() + 2 * _TIMEOUT

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: Any,
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:
        self.headers.append(headers)
        fp.close()  # urllib would read what comes with it to its end, which there may not be
        if time.monotonic() > self._end:
            raise _Slow(f"redirects took more than {2 * _TIMEOUT:g} s")
        if urlsplit(newurl).scheme not in ("https", urlsplit(req.full_url).scheme):
            raise urllib.error.HTTPError(
                req.full_url, code, f"redirect to {newurl}, which is not https", headers, fp
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Patient:
    """Of a connection: the head of an answer comes within a time, not each byte of it."""

    sock: socket.socket | None

    def getresponse(self) -> http.client.HTTPResponse:
        timer = threading.Timer(2 * _TIMEOUT, self._break_off)
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse()  # type: ignore[misc]
        finally:
            timer.cancel()

    def _break_off(self) -> None:
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


class _HttpConnection(_Patient, http.client.HTTPConnection):
    pass


class _HttpsConnection(_Patient, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HttpConnection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HttpsConnection, req)


def _open(
    url: str, path: Path, start: int, etag: str
) -> tuple[http.client.HTTPResponse, list[Message]]:
    """The answer to a GET from byte `start`, and the headers of all answers on the way."""
    headers = {"User-Agent": f"vit_jax/{__version__}"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": etag}
    redirects = _Redirects()
    try:
        request = urllib.request.Request(url, headers=headers)
        token = os.environ.get("HF_TOKEN", "").strip()
        if token and url.startswith(_host("VIT_JAX_HF_URL") + "/"):
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        opener = urllib.request.build_opener(redirects, _Http(), _Https())
        answer = opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        with contextlib.closing(error):  # which a redirect has closed already
            raise _refusal(error, url, path) from error
    except urllib.error.URLError as error:
        raise _Unreachable(_why(error.reason)) from error
    except (http.client.InvalidURL, ValueError) as error:
        raise UserError(f"{url} is no valid URL ({error}); correct it.") from error
    except (http.client.HTTPException, OSError) as error:
        raise _Cut(_why(error)) from error
    return answer, [*redirects.headers, answer.headers]


def _refusal(error: urllib.error.HTTPError, url: str, path: Path) -> Exception:
    if error.code == 416:  # we have all the bytes, or more: a leftover of something else
        _forget(_beside(path, ".part"))
        return _Cut("the file on the server has changed")
    if error.code in (408, 429) or error.code >= 500:
        return _Cut(f"HTTP {error.code}")
    if error.code in (404, 410):
        return _NotFound(f"there is no file {url} (HTTP {error.code}); check the name.")
    reason = str(error.reason).partition("\n")[0].rstrip(". ")
    return UserError(
        f"{url} cannot be fetched (HTTP {error.code}: {reason}); check the name, or, "
        f"if the file is not public, set HF_TOKEN (of the hub) or put it at {path}."
    )


def _why(error: object) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return reason or type(error).__name__
