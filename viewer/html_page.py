"""Pages of HTML that are one file each: tables, pictures, style."""

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

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
    """An HTML page of a title and of parts that are HTML already. Raises BadInput."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = f'<h1>{html.escape(title)}</h1>{"".join(parts)}'
    write_text(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n')


def html_picture(title: str, picture: np.ndarray, photos: bool = False) -> str:
    """An (H, W, 3) picture under its title, with its bytes in the page: WebP where there are photos in it."""
    file = io.BytesIO()
    kind = 'webp' if photos else 'png'
    Image.fromarray(picture).save(file, kind, **({'quality': 82} if photos else {'optimize': True}))
    content = base64.b64encode(file.getvalue()).decode()
    shown = html.escape(title)
    return f'<h2>{shown}</h2><img alt="{shown}" src="data:image/{kind};base64,{content}">'


def html_table(lines: list[list[str]], total: str | None = None) -> str:
    """An HTML table, the first line its headings; that which begins with `total` stands out."""
    rows = []
    for number, line in enumerate(lines):
        tag = 'td' if number else 'th'
        cells = ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in line)
        rows.append(f'<tr class="total">{cells}</tr>' if line[0] == total else f'<tr>{cells}</tr>')
    return f'<table>{"".join(rows)}</table>'
