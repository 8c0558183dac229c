"""Files that are whole or not there."""

import errno

import pytest

from utils import files
from utils.errors import BadInput
from utils.files import lock, make_folder, write_text, write_whole
from utils.log import start_log


def test_old_content_stays_until_the_new_is_whole(tmp_path):
    path = tmp_path / 'deep' / 'a.txt'
    write_text(path, 'old')
    with pytest.raises(RuntimeError), write_whole(path) as file:
        file.write(b'half')
        raise RuntimeError
    assert path.read_text() == 'old'
    write_text(path, 'new')
    assert path.read_text() == 'new' and [p.name for p in path.parent.iterdir()] == ['a.txt']


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'folder').mkdir()
    for name in ('file/a.txt', 'folder', 'x' * 300):
        with pytest.raises(BadInput, match='cannot be written'):
            write_text(tmp_path / name, 'y')
    with pytest.raises(BadInput, match='cannot be written'):
        make_folder(tmp_path / 'file' / 'a')
    with pytest.raises(BadInput, match='folder: cannot be written'), lock(tmp_path / 'folder', 'testing'):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'folder']


def test_log_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / 'log.txt').mkdir()
    with pytest.raises(BadInput, match='log.txt: cannot be written'):
        start_log(tmp_path)
    start_log(None)


def test_lock_that_cannot_be_is_one_line(tmp_path, monkeypatch):
    (tmp_path / '.lock').mkdir()
    for name in ('.lock', 'x' * 300):
        with pytest.raises(BadInput, match='cannot be written'), lock(tmp_path / name, 'training'):
            raise AssertionError

    def no_locks(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(files.fcntl, 'flock', no_locks)
    with (
        pytest.raises(BadInput, match='cannot be locked: No locks available'),
        lock(tmp_path / 'a', 'training'),
    ):
        raise AssertionError
