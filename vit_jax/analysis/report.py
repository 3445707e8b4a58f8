"""One self-contained HTML page: no other files, no network, no script."""

import base64
from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Picture(NamedTuple):
    """A figure with what a reader must know about it.

    Attributes:
      title: its heading.
      caption: plain text.
      png: the bytes of a PNG file.
    """

    title: str
    caption: str
    png: bytes


class Photo(NamedTuple):
    """A photo and the model's predictions for it.

    Attributes:
      name: its file.
      predictions: names of classes with probabilities, most probable first.
      pictures: of this photo alone.
    """

    name: str
    predictions: Sequence[tuple[str, float]]
    pictures: Sequence[Picture]


_STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff;
  font: 1rem/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1.5rem; }
h3 { overflow-wrap: anywhere; margin-top: 2rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; max-width: 45rem; }
table { border-collapse: collapse; }
th { text-align: left; font-weight: normal; color: #555; padding-right: 1.5rem; }
td.bar { width: 16rem; }
td.bar div { background: #0072B2; height: 0.8rem; min-width: 1px; }
td.number { text-align: right; padding: 0 1rem; font-variant-numeric: tabular-nums; }
@media print { h2, figure, table { break-inside: avoid; } }
"""


def page(
    title: str,
    facts: Sequence[tuple[str, str]],
    pictures: Sequence[Picture],
    photos: Sequence[Photo],
    notes: Sequence[str],
) -> str:
    """The whole page as HTML.

    Args:
      title: the heading.
      facts: names and values for a table at the top.
      pictures: of the model as a whole.
      photos: one section for each.
      notes: sentences about what is missing.
    """
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>\n" for k, v in facts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<table>\n{rows}</table>\n"
        + "".join(f'<p class="note">{escape(note)}</p>\n' for note in notes)
        + "".join(map(_section, pictures))
        + ("<h2>Photos</h2>\n" if photos else "")
        + "".join(map(_photo, photos))
        + "</body>\n</html>\n"
    )


def _section(picture: Picture) -> str:
    return f"<h2>{escape(picture.title)}</h2>\n{_figure(picture)}"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>\n"
    )


def _photo(photo: Photo) -> str:
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{100 * p:.2f}%</td>'
        f'<td class="bar"><div style="width: {100 * p:.2f}%"></div></td></tr>\n'
        for name, p in photo.predictions
    )
    table = f"<table>\n{rows}</table>\n" if rows else ""
    return f"<h3>{escape(photo.name)}</h3>\n{table}{''.join(map(_figure, photo.pictures))}"
