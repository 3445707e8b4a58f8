"""Random changes of bytes, texts and JSON values, of the kinds that readers stumble over."""

import copy
import json
import random
from typing import Any

EXTREMES = (
    0,
    1,
    0x7F,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63,
    2**64 - 1,
)
WORDS = (
    "NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "-1", "0", "1.5", "null", "true",
    "\0", "\ufeff", "\r", "\n\n", '"', '""', ",", "\t", ";", "[" * 3000, '{"a":' * 3000,
    "x" * 5000, "../../x", "/etc/passwd", "\\ud800", "\x1b[2J", "\u2028", "9999999",
    "10000000000", "e" * 300_000,
)  # fmt: skip
ENCODINGS = ("utf-16", "utf-32", "utf-8-sig", "cp037")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 1.5, -0.5, 1e300, float("nan"),
    float("inf"), "", "x", "\ud800", "a\0b", "../../x", "two\nlines", "x" * 100_000, [], {},
    [[]], [1, 2], [1, 2, 3], [10**9, 10**9], {"height": 10**6, "width": 10**6}, ["a"] * 1000,
)  # fmt: skip


def of_bytes(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """One to four changes: flips, extreme numbers, cuts, insertions and copies.

    Half of them hit the first 256 bytes, where headers are. `other` is what pieces of another
    file are taken from.
    """
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not changed:
            break
        near = rng.random() < 0.5
        at = rng.randrange(min(len(changed), 256) if near else len(changed))
        length = rng.choice([1, 2, 4, 16, 64, 512])
        match rng.randrange(10):
            case 0 | 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                changed[at] = rng.randrange(256)
            case 3 | 4:
                width = rng.choice([1, 2, 4, 8])
                number = rng.choice(EXTREMES) % 256**width
                field = number.to_bytes(width, rng.choice(["little", "big"]))
                changed[at : at + width] = field
            case 5:
                del changed[at : at + length]
            case 6:
                changed[at:at] = rng.randbytes(length)
            case 7:
                source = other or data
                start = rng.randrange(len(source))
                changed[at:at] = source[start : start + length]
            case 8:
                changed[at : at + length] = bytes(length)
            case 9:
                if rng.random() < 0.3:
                    del changed[at:]
    return bytes(changed)


def of_text(data: bytes, rng: random.Random) -> bytes:
    """Changes of a text: words of trouble, lines twice, other encodings; or of its bytes."""
    if rng.random() < 0.3:
        return of_bytes(data, rng)
    for _ in range(rng.randint(1, 3)):
        lines = data.split(b"\n")
        i = rng.randrange(len(lines))
        match rng.randrange(8):
            case 0 | 1 | 2:
                at = rng.randrange(len(lines[i]) + 1)
                lines[i] = lines[i][:at] + rng.choice(WORDS).encode() + lines[i][at:]
            case 3:
                lines.insert(rng.randrange(len(lines)), lines[i])
            case 4:
                for between in (b",", b"\t"):
                    cells = lines[i].split(between)
                    if len(cells) > 1:
                        cells[rng.randrange(len(cells))] = rng.choice(WORDS).encode()
                        lines[i] = between.join(cells)
            case 5:
                cells = lines[0].split(b",")  # a column twice, or one too many or too few
                cells.insert(rng.randrange(len(cells) + 1), rng.choice([*cells, b"split", b""]))
                lines[0] = b",".join(cells)
            case 6:
                del lines[i]
                lines = lines or [b""]
            case 7:
                if rng.random() < 0.3:
                    text = data.decode("utf-8", "replace")
                    return text.encode(rng.choice(ENCODINGS), "replace")
        data = b"\n".join(lines)
    return data


def of_json(value: Any, rng: random.Random) -> Any:
    """A JSON value with one to three parts taken out, renamed, exchanged or nested deeply."""
    changed = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(changed))
        if not places:
            break
        inside, key = rng.choice(places)
        match rng.randrange(8):
            case 0:
                del inside[key]
            case 1:
                if isinstance(inside, dict):
                    inside[rng.choice(["", "x", "\ud800", f"{key} "])] = inside.pop(key)
            case 2:
                other, name = rng.choice(places)
                inside[key] = copy.deepcopy(
                    other.get(name) if isinstance(other, dict) else other[0]
                )
            case 3:
                for _ in range(rng.choice([1, 50, 150])):
                    inside[key] = [inside[key]]
            case _:
                inside[key] = copy.deepcopy(rng.choice(VALUES))
    return changed


def _places(value: Any) -> Any:
    """(container, key) of every part of a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(pairs):
        yield value, key
        if isinstance(part, dict | list) and part:
            yield from _places(part)


def json_bytes(value: Any, rng: random.Random) -> bytes:
    """A JSON value that was changed as a value, as a text, or as bytes."""
    if rng.random() < 0.7:
        return json.dumps(of_json(value, rng)).encode()
    return of_text(json.dumps(value, indent=1).encode(), rng)
