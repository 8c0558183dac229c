"""Write HTML pages that are one file each, with tables, pictures, style and a script that sorts in them.

    write_page(path, title, intro, [Section('Classes', html_table(lines)), ...])

A page is laid out for a phone as for a wide screen, and is dark where the browser asks for it. Without the
script it lacks nothing but the sorting.
"""

import base64
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from metrics import Interval, row_shares
from utils.files import write_text
from utils.plotting import RIGHT, WRONG

GAP = 8  # between the views of a photo, in their pixels
STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c1c1c; --pale: #6b6b6b; --line: #e2e2e2; --paper: #fff; --block: #f4f4f4; --link: #0060a8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e6e6; --pale: #a3a3a3; --line: #3a3a3a; --paper: #161616; --block: #232323; --link: #7cc4ff;
  }
  .chart img { filter: invert(.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body {
  margin: 0 auto; padding: 1rem; max-width: 110rem; overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
}
a { color: var(--link); }
h1, h2 { font-weight: 600; line-height: 1.25; }
h1 { margin: 0 0 .5rem; font-size: 1.7rem; }
h2 { margin: 2rem 0 .5rem; font-size: 1.3rem; }
nav ol { margin: 0; padding: 0; list-style: none; }
nav a { display: block; padding: .3rem 0; text-decoration: none; }
nav a:hover { text-decoration: underline; }
pre { margin: 0; padding: 1em; overflow-x: auto; background: var(--block); }
summary { cursor: pointer; padding: .3rem 0; }
.scroll { max-width: 100%; overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
td, th { padding: .3em .8em; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--paper); }
td:first-child, th:first-child, .words { text-align: left; }
td:first-child { max-width: 16rem; overflow: hidden; text-overflow: ellipsis; }
tr.total td { font-weight: 600; border-top: 2px solid var(--ink); }
th button { all: unset; cursor: pointer; white-space: nowrap; }
th button:hover, th button:focus-visible { text-decoration: underline; }
th button::after { content: " \\2195"; color: var(--pale); }
th[aria-sort=ascending] button::after { content: " \\2191"; color: inherit; }
th[aria-sort=descending] button::after { content: " \\2193"; color: inherit; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
.charts img { width: 35rem; }
img { max-width: 100%; }
.photos {
  display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr));
}
figure { margin: 0; max-width: 50rem; min-width: 0; }
.views { overflow-x: auto; }
.views div { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; color: var(--pale); }
.views > * { width: 100%; text-align: center; font-size: .8rem; }
.views svg { display: block; height: auto; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .85rem; color: var(--pale); }
figcaption b { flex: 1 1 100%; font-weight: 600; color: var(--ink); }
.swatch {
  display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  border: 1px solid #8888; vertical-align: -.05em;
}
.to-contents {
  position: fixed; right: .75rem; bottom: .75rem; padding: .4rem .8rem; border-radius: 2rem;
  background: var(--block); border: 1px solid var(--line); text-decoration: none;
}
@media (max-width: 640px) { .views > * { min-width: 33rem; } }
@media (max-width: 1199px) {
  nav { max-height: 11rem; overflow-y: auto; padding: .3rem .8rem; background: var(--block); }
  nav ol { display: flex; flex-wrap: wrap; gap: 0 1.1rem; }
}
@media (min-width: 1200px) {
  body { display: grid; grid-template-columns: 13rem minmax(0, 1fr); gap: 0 2rem; padding: 1.5rem 2rem; }
  header { grid-column: 2; }
  nav {
    grid-area: 1 / 1 / span 2; position: sticky; top: 1.5rem; align-self: start;
    max-height: calc(100vh - 3rem); overflow-y: auto; font-size: .9rem;
  }
  .to-contents { display: none; }
}
@media print { nav, .to-contents { display: none; } }
"""
CONFUSION_STYLE = """
table.confusion td { text-align: center; padding: .3em .5em; border: 2px solid var(--paper); }
table.confusion td:first-child { text-align: left; font-weight: 600; }
table.confusion th { border: 0; text-align: center; padding: .3em .5em; white-space: normal; }
table.confusion .few { color: var(--pale); }
"""
SCRIPT = Path(__file__).with_name('sort.js').read_text(encoding='utf-8')
NUMBER = re.compile(r'([+-]?[\d,]*\.?\d+x?%?( ?(to|\(|\[) ?.*)?|-|)')  # as in tables, with its interval


class Section(NamedTuple):
    """A part of a page, which its contents list: a title, and HTML."""

    title: str
    body: str


def write_page(path: Path, title: str, intro: str, sections: Sequence[Section]) -> None:
    """Write a page of a title, an introduction that is HTML already, a contents list and sections. Raises
    BadInput.
    """
    heading = html.escape(title)
    titles = [html.escape(section.title) for section in sections]
    links = ''.join(f'<li><a href="#s{n}">{name}</a></li>' for n, name in enumerate(titles))
    body = ''.join(
        f'<section id="s{n}"><h2>{name}</h2>{section.body}</section>\n'
        for n, (name, section) in enumerate(zip(titles, sections, strict=True))
    )
    write_text(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{heading}</title><style>{STYLE}{CONFUSION_STYLE}</style></head><body>\n'
        f'<header><h1>{heading}</h1>{intro}</header>\n'
        f'<nav id="contents" aria-label="Contents"><ol>{links}</ol></nav>\n'
        f'<main>{body}</main>\n<a class="to-contents" href="#contents">Contents</a>\n'
        f'<script type="module">{SCRIPT}sortTables(document)</script></body></html>\n',
    )


def html_charts(charts: Mapping[str, np.ndarray]) -> str:
    """Embed (H, W, 3) pictures of ink on white by their descriptions, side by side where there is room."""
    images = (f'<img alt="{html.escape(name)}" src="{data_url(one)}">' for name, one in charts.items())
    return f'<div class="chart charts">{"".join(images)}</div>'


def data_url(picture: np.ndarray, kind: str = 'png', **options: object) -> str:
    """Encode an (H, W, 3) picture as an address that holds it whole; `options` are Pillow's for the kind."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return f'data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}'


def html_views(views: Sequence[np.ndarray], name: str, label: str) -> tuple[str, str]:
    """Draw (h, w, 3) views of one size side by side; return an SVG that holds them under a name, and one that
    shows them again in the same page.
    """
    height, width = views[0].shape[:2]
    cell = max(width, height // 2)
    images = ''.join(
        f'<image x="{n * (cell + GAP) + (cell - width) // 2}" width="{width}" height="{height}" '
        f'href="{data_url(view, "webp", quality=82)}"/>'
        for n, view in enumerate(views)
    )
    box = f'0 0 {len(views) * (cell + GAP) - GAP} {height}'
    contents = f'<g id="{name}">{images}</g>', f'<use href="#{name}"/>'
    first, again = (
        f'<svg viewBox="{box}" role="img" aria-label="{html.escape(label)}">{content}</svg>'
        for content in contents
    )
    return first, again


def html_swatch(colour: Sequence[int], name: str) -> str:
    """Show a class by its colour and name."""
    rgb = ', '.join(map(str, colour))
    return f'<span><i class="swatch" style="background: rgb({rgb})"></i>{html.escape(name)}</span>'


def html_table(
    lines: Sequence[Sequence[str]],
    total: str | None = None,
    links: Mapping[tuple[str, str], str] | None = None,
) -> str:
    """Make a table whose first line is its header; the line that begins with `total` is set off, and stays
    below with those after it when the others are sorted. `links` has the addresses of cells, by the first
    cells of their line and column. Columns of numbers are set to the right, those of words to the left.
    """
    (head, *rows), links = lines, links or {}
    foot = next((n for n, row in enumerate(rows) if total is not None and row[0] == total), len(rows))
    numeric = [all(map(NUMBER.fullmatch, column)) for column in zip(*rows, strict=True)] or [True] * len(head)
    kinds = ['' if is_number else ' class="words"' for is_number in numeric]

    def line(row: Sequence[str]) -> str:
        cells = []
        for column, text in zip(head, row, strict=True):
            href, text = links.get((row[0], column)), html.escape(text)
            cells.append(f'<a href="{html.escape(href)}">{text}</a>' if href else text)
        kind = ' class="total"' if row[0] == total else ''
        cells = [f'<td{kind}>{cell}</td>' for kind, cell in zip(kinds, cells, strict=True)]
        return f'<tr{kind}>{"".join(cells)}</tr>'

    header = ''.join(
        f'<th scope="col"{kind}>{html.escape(cell)}</th>' for kind, cell in zip(kinds, head, strict=True)
    )
    below = f'<tfoot>{"".join(map(line, rows[foot:]))}</tfoot>' if rows[foot:] else ''
    body = f'<thead><tr>{header}</tr></thead><tbody>{"".join(map(line, rows[:foot]))}</tbody>{below}'
    return f'<div class="scroll"><table class="sortable">{body}</table></div>'


def html_confusion(
    matrix: np.ndarray,
    classes: Sequence[str],
    address: Callable[[int, int], str | None] = lambda true, predicted: None,
) -> str:
    """Make a table of (K, K) pixel counts in percent of each row, which holds the pixels of a true class;
    `address` of a true and a predicted class is where a click on their cell leads. Its style is
    CONFUSION_STYLE.
    """
    shares, rows = row_shares(matrix), []
    for true, name in enumerate(classes):
        cells = [f'<td>{html.escape(name)}</td>']
        for predicted, share in enumerate(shares[true].tolist()):
            text = f'{100 * share:.1f}' if matrix[true].any() else ''
            if href := address(true, predicted):
                text = f'<a href="{html.escape(href)}">{text}</a>'
            colour = RIGHT if true == predicted else WRONG
            tint = f' style="background: rgba({", ".join(map(str, colour))}, {0.65 * share**0.7:.2f})"'
            kind = tint if share >= 0.005 else ' class="few"'
            title = f'{name} predicted as {classes[predicted]}: {int(matrix[true, predicted]):,} pixels'
            cells.append(f'<td{kind} title="{html.escape(title)}">{text}</td>')
        rows.append(f'<tr>{"".join(cells)}</tr>')
    names = ''.join(f'<th scope="col">{html.escape(name)}</th>' for name in ('', *classes))
    body = f'<thead><tr>{names}</tr></thead><tbody>{"".join(rows)}</tbody>'
    return f'<div class="scroll"><table class="confusion">{body}</table></div>'


def format_score(value: float) -> str:
    """Format a score for a table; a dash for nan."""
    return '-' if math.isnan(value) else f'{value:.4f}'


def format_interval(interval: Interval) -> str:
    """Format the ends of an interval for a table; a dash for nan."""
    if math.isnan(interval.low):
        return '-'
    return f'{format_score(interval.low)} to {format_score(interval.high)}'
