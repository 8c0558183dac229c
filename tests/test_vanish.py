"""Photos and CSVs that vanish or change while the app shows them: a line in the page, no traceback."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import write_set
from test_app import make_output

testing = pytest.importorskip('streamlit.testing.v1')


def show(page, data, output):
    from importlib import import_module
    from pathlib import Path

    from config import HOME
    from utils.errors import BadInput
    from viewer.app_data import show_error

    try:
        import_module(page).page(Path(data), Path(output), HOME)
    except BadInput as error:
        show_error(error)  # as viewer/app.py does


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('vanish')
    make_output(write_set(folder / 'data', train=4, test=2), folder / 'output')
    return folder


def delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


CHANGES = [
    ('photos', 'data/batch_01/0000.jpg', delete), ('photos', 'data/batch_01/0000.jpg', cut),
    ('photos', 'data/batch_01/0000.jpg', replace_by_folder), ('photos', 'data', delete),
    ('photos', 'data/batch_01/0000.jpg', replace_by_pipe), ('photos', 'data/train_all.json', delete),
    ('photos', 'output/run/fold0/oof.csv', cut),
    ('photos', 'output/run/fold0/oof.csv', replace_by_pipe), ('photos', 'output', delete),
    ('runs', 'output/run/fold0/oof.csv', replace_by_folder), ('runs', 'output/run/fold0/metrics.csv', cut),
    ('runs', 'output/run/fold0/config.yaml', replace_by_circle), ('runs', 'output', delete),
    ('runs', 'data/train_all.json', cut),
]  # fmt: skip
QUIET = ('output', 'metrics.csv', 'config.yaml')  # without them there is only less to show


@pytest.mark.parametrize(('page', 'name', 'change'), CHANGES)
def test_a_line_and_no_traceback(folder, tmp_path, page, name, change):
    shutil.copytree(folder, tmp_path / 'all')
    args = (f'viewer.page_{page}', str(tmp_path / 'all/data'), str(tmp_path / 'all/output'))
    app = testing.AppTest.from_function(show, args=args, default_timeout=60)
    if page == 'photos':
        app.query_params['photo'] = 'batch_01/0000.jpg'
    app.run()
    assert not app.exception and not app.error
    path = tmp_path / 'all' / name
    change(path)
    app.run()
    assert not app.exception, app.exception[0].stack_trace
    assert app.error or name.endswith(QUIET)
    assert all('\n' not in error.value for error in app.error)
