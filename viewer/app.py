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

STYLE = Path(__file__).with_name('app.css').read_text(encoding='utf-8')


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument('--data', type=Path)
    parser.add_argument('--output', type=Path, default=Path('output'))
    parser.add_argument('--labels', type=Path)
    add_config_arguments(parser, required=False)
    args = parser.parse_args(argv)
    st.set_page_config('Segmentation', layout='wide')
    st.html(f'<style>{STYLE}</style>')
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

    photos = make_page(partial(page_photos.page, labels=args.labels), 'Photos', 'photos')
    runs = make_page(partial(page_runs.page, photos=photos), 'Runs', 'start', default=True)  # at /
    sort = make_page(page_sorting.page, 'Sort it for me', 'sort')
    to_runs = st.Page(partial(st.switch_page, runs), title='Runs', url_path='runs', visibility='hidden')
    page = st.navigation([runs, photos, sort, to_runs])
    st.set_page_config(f'{page.title} · {data.resolve().name}')
    page.run()


if __name__ == '__main__':
    main()
