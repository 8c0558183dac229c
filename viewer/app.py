"""Serve the browser app, which viz.py app starts: runs, photos with their predictions, and sorting."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import streamlit as st

from submission import competition_and_data
from utils.cli import ArgumentParser, add_config_arguments
from utils.errors import BadInput
from viewer import page_photos, page_runs, page_sorting
from viewer.app_data import show_error

STYLE = """
<style>
.block-container { padding-top: 2.5rem; max-width: 1800px; }
.swatch {
    display: inline-block; width: .9em; height: .9em; margin-right: .5em;
    border: 1px solid #8888; vertical-align: -.1em;
}
.legend { font-size: .875rem; line-height: 1.7; }
table { border-collapse: collapse; margin-bottom: 1em; font-size: .875rem; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
td, th { padding: .25em .9em; text-align: right; border-bottom: 1px solid #8883; }
td:first-child, th:first-child { text-align: left; }
th { font-weight: 600; vertical-align: bottom; }
tr.total td { font-weight: 600; border-top: 2px solid #888; }
.bin { border-left: .6em solid; padding: .1em 0 .1em 1em; margin-bottom: .8em; }
.bin h4 { margin: 0; padding: 0; }
.bin ul { list-style: none; margin: .2em 0; padding: 0; }
.bin p { margin: 0; opacity: .75; font-size: .875rem; }
</style>
"""


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument('--data', type=Path)
    parser.add_argument('--output', type=Path, default=Path('output'))
    parser.add_argument('--labels', type=Path)
    add_config_arguments(parser, required=False)
    args = parser.parse_args(argv)
    st.set_page_config('Segmentation', layout='wide')
    st.html(STYLE)
    try:
        competition, data = competition_and_data(args)
    except BadInput as error:
        show_error(error)
        return

    def make_page(page: Callable[..., None], title: str, url_path: str, **options) -> st.Page:
        def show() -> None:
            try:
                page(data, args.output, competition)
            except BadInput as error:
                show_error(error)

        return st.Page(show, title=title, url_path=url_path, **options)

    photos = partial(page_photos.page, labels=args.labels)
    pages = [
        make_page(page_runs.page, 'Runs', 'runs', default=True),
        make_page(photos, 'Photos', 'photos'),
        make_page(page_sorting.page, 'Sort it for me', 'sort'),
    ]
    st.navigation(pages).run()


if __name__ == '__main__':
    main()
