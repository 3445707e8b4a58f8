"""The page stands alone, and what it is given cannot break it."""

import base64
import re
from html.parser import HTMLParser

from vit_jax.analysis.report import Photo, Picture, page

VOID = {"meta", "img"}


class Checker(HTMLParser):
    """Collects text and sources; fails where tags are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.sources = [], "", []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else():
    picture = Picture("A <b>title</b>", 'a "caption" & more', b"\x89PNG bytes")
    photos = [
        Photo("<script>.png", [("R&D", 0.75), ("cat", 0.0)], [picture]),
        Photo("b.png", [], []),
    ]
    html = page("<Title>", [("model", "B/16 <x>")], [picture], photos, ["a note <i>"])
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    encoded = base64.b64encode(b"\x89PNG bytes").decode()
    assert checker.sources == [f"data:image/png;base64,{encoded}"] * 2
    for text in ("<Title>", "B/16 <x>", 'a "caption" & more', "<script>.png", "R&D", "75.00%",
                 "a note <i>"):  # fmt: skip
        assert text in checker.text
    assert "<script" not in html
    assert not re.search(r"https?:|url\(|@import", html)
