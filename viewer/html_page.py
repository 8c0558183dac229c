"""Write HTML pages that are one file each, with tables, pictures and style in them."""

import base64
import html
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

from metrics import Interval
from utils.files import write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1640px; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; }
h1, h2 { font-weight: 600; }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; }
table { border-collapse: collapse; margin-bottom: 1em; font-variant-numeric: tabular-nums; }
td, th { padding: .25em .9em; text-align: right; border-bottom: 1px solid #e4e4e4; }
td:first-child, th:first-child { text-align: left; }
tr.total td { font-weight: 600; border-top: 2px solid #1c1c1c; }
"""


def write_page(path: Path, title: str, parts: list[str]) -> None:
    """Write a page of a title and of parts that are HTML already. Raises BadInput."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = f'<h1>{html.escape(title)}</h1>{"".join(parts)}'
    write_text(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n')


def html_picture(title: str, picture: np.ndarray, photos: bool = False) -> str:
    """Embed an (H, W, 3) picture under its title: as WebP if it has photos in it, else as PNG."""
    heading = html.escape(title)
    options = {'quality': 82} if photos else {'optimize': True}
    address = data_url(picture, 'webp' if photos else 'png', **options)
    return f'<h2>{heading}</h2><img alt="{heading}" src="{address}">'


def data_url(picture: np.ndarray, kind: str = 'png', **options: object) -> str:
    """Encode an (H, W, 3) picture as an address that holds it whole; `options` are Pillow's for the kind."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, **options)
    return f'data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}'


def html_table(lines: list[list[str]], total: str | None = None) -> str:
    """Make a table; the first line is its header, and the line that begins with `total` is set off."""
    rows = []
    for number, line in enumerate(lines):
        tag = 'td' if number else 'th'
        cells = ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in line)
        rows.append(f'<tr class="total">{cells}</tr>' if line[0] == total else f'<tr>{cells}</tr>')
    return f'<table>{"".join(rows)}</table>'


def format_score(value: float) -> str:
    """Format a score for a table; a dash for nan."""
    return '-' if math.isnan(value) else f'{value:.4f}'


def format_interval(interval: Interval) -> str:
    """Format the ends of an interval for a table; a dash for nan."""
    if math.isnan(interval.low):
        return '-'
    return f'{format_score(interval.low)} to {format_score(interval.high)}'
