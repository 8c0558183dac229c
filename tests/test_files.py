"""Files are written whole or not at all, and a folder is locked by one process."""

import csv
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import file_limit

from utils.errors import BadInput, Interrupted
from utils.files import (
    lock,
    make_folder,
    normal_name,
    save_array,
    write_csv,
    write_sheet,
    write_text,
    write_whole,
)
from utils.log import start_log

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(('name', 'normal'), [
    ('a/b.jpg', 'a/b.jpg'), ('a\\b.jpg', 'a/b.jpg'), ('./a.jpg', 'a.jpg'), ('.\\.\\a.jpg', 'a.jpg'),
    ('e\u0301.jpg', 'é.jpg'), ('\u1112\u1161\u11ab.jpg', '한.jpg'),
    ('.a/./b.jpg', '.a/./b.jpg'), ('../a', '../a'),
])  # fmt: skip
def test_names_of_a_mac_and_of_windows_are_those_of_linux(name, normal):
    assert normal_name(name) == normal_name(normal) == normal


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
    with pytest.raises(BadInput, match='folder: cannot be locked'), lock(tmp_path / 'folder', 'testing'):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'folder']


@pytest.mark.parametrize('count', [200, 200_000])
def test_an_array_that_has_no_room_is_not_cut_off(tmp_path, count):
    """NumPy alone reports no error if few bytes are missing: it looks at nothing when it closes the file."""
    save_array(tmp_path / 'a.npy', np.arange(3))
    with file_limit(150), pytest.raises(Interrupted, match='a.npy: cannot be written: File too large'):
        save_array(tmp_path / 'a.npy', np.arange(count))
    assert np.load(tmp_path / 'a.npy').tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ['a.npy']


def test_a_lock_that_has_no_room_names_itself(tmp_path):
    found = pytest.raises(Interrupted, match='a.lock: cannot be written')
    with file_limit(0), found, lock(tmp_path / 'a.lock', 'x'):
        raise AssertionError


def test_log_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / 'log.txt').mkdir()
    with pytest.raises(BadInput, match='log.txt: cannot be written'):
        start_log(tmp_path)
    start_log(None)


def test_lock_that_cannot_be_taken_is_one_line(tmp_path, monkeypatch):
    (tmp_path / '.lock').mkdir()
    for name in ('.lock', 'x' * 300):
        with pytest.raises(BadInput, match='cannot be locked'), lock(tmp_path / name, 'training'):
            raise AssertionError

    def no_locks(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', no_locks)
    with pytest.raises(BadInput, match='cannot be locked: No locks available'), lock(tmp_path / 'a', 'x'):
        raise AssertionError
    no_flock = OSError(errno.ENOSYS, 'Function not implemented')
    monkeypatch.setattr(fcntl, 'flock', mock.Mock(side_effect=no_flock))
    with pytest.raises(BadInput, match='cannot be locked: Function not'), lock(tmp_path / 'b', 'x'):
        raise AssertionError


def test_lock_is_released_and_names_its_holder(tmp_path):
    path = tmp_path / 'run' / '.lock'
    with lock(path, 'training'):
        message = f'run: process {os.getpid()} is training here now'
        with pytest.raises(BadInput, match=message), lock(path, 'training'):
            raise AssertionError
    with pytest.raises(ZeroDivisionError), lock(path, 'training'):
        raise ZeroDivisionError
    with lock(path, 'training'), lock(None, 'training'):
        pass


HOLDER = """
import os, sys, time
from pathlib import Path
from utils.files import lock

with lock(Path(sys.argv[1]), 'training'):
    worker = os.fork()
    if not worker:
        time.sleep(60)
    print(worker, flush=True)
    time.sleep(60)
"""


def test_lock_ends_with_its_process_and_not_with_its_workers(tmp_path, capsys):
    path = tmp_path / '.lock'
    with subprocess.Popen(
        [sys.executable, '-c', HOLDER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as holder:
        worker = int(holder.stdout.readline())
        try:
            with pytest.raises(BadInput, match=f'process {holder.pid} is training'), lock(path, 'training'):
                raise AssertionError
            threading.Timer(0.5, holder.kill).start()
            with lock(path, 'training', wait=True):
                os.kill(worker, 0)  # it is alive
        finally:
            os.kill(worker, signal.SIGKILL)
    assert capsys.readouterr().err.endswith(f'process {holder.pid} is training here now; waiting for it\n')


RUN = [
    "=cmd|' /C calc'!A0",
    '+1+cmd',
    '-2+3',
    '@SUM(1)',
    '\t=1',
    '\n=1',
    '\uff1d1',
    '-',
    '=',
    '+.',
    '-1-1',
]
KEPT = ['a=b', '한.jpg', "'", '', '-1', '+2.5', '-1e-05', 'a;=1', 'a"=1', 3, -2, -0.5]


def test_a_spreadsheet_runs_nothing(tmp_path):
    write_sheet(tmp_path / 'a.csv', [(cell, 'x') for cell in (*RUN, '\r=1', *KEPT)])
    with (tmp_path / 'a.csv').open(newline='') as file:
        cells = [row[0] for row in csv.reader(file)]
    assert cells == [*(f"'{cell}" for cell in (*RUN, '\r=1')), *map(str, KEPT)]
    assert '"a;=1","x"\n' in (tmp_path / 'a.csv').read_text()


def test_what_scripts_read_stays_as_it_is(tmp_path):
    write_csv(tmp_path / 'a.csv', [(cell, 'x') for cell in RUN])
    with (tmp_path / 'a.csv').open(newline='') as file:
        assert [row[0] for row in csv.reader(file)] == RUN
