"""Mount the parts of a page that run in the browser: links without a reload, and the views of a photo."""

from pathlib import Path
from typing import Any

import streamlit as st

from viewer.html_page import SCRIPT

FOLDER = Path(__file__).parent
_links = st.components.v2.component(
    'links',
    html='<div class="links"></div>',
    js=SCRIPT + (FOLDER / 'links.js').read_text(encoding='utf-8'),
    isolate_styles=False,
)
_photo_views = st.components.v2.component(
    'photo_views',
    html='<div class="viewer"></div>',
    js=(FOLDER / 'views.js').read_text(encoding='utf-8'),
    css=(FOLDER / 'views.css').read_text(encoding='utf-8'),
)


def links(html: str, key: str) -> str | None:
    """Show HTML, whose texts are escaped; return the href of the link that was just clicked, if one was."""
    return _links(data=html, key=key, on_clicked_change=lambda: None).clicked


def photo_views(data: dict[str, Any]) -> None:
    """Show the views of a photo, which page_photos.show_views makes and views.js draws."""
    _photo_views(data=data, key='views')
