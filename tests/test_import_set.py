"""Test how an imported set is written: whole or absent, whatever kills it, and never over something else."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from entry_points import ROOT
from PIL import Image

import prepare
from config import Competition, read_competition
from data import importers
from data.coco import draw_mask, read_coco, read_photo
from utils import files
from utils.errors import BadInput, Interrupted
from utils.files import lock

SIDE = 16
CLASSES = ('Background', 'dark', 'light')
GREYS = (0, 60, 220)  # of a photo whose mask is full of that class


def write_source(root: Path, k: int, names: str = 'ab') -> list[str]:
    """Write photos of the grey of a class and their masks; return the words of the command."""
    for kind in 'pmt':
        (root / kind).mkdir(parents=True)
    for name in names:
        Image.new('RGB', (SIDE, SIDE), (GREYS[k],) * 3).save(root / f'p/{name}.png')
        Image.new('L', (SIDE, SIDE), k).save(root / f'm/{name}.png')
    Image.new('RGB', (SIDE, SIDE), (GREYS[k],) * 3).save(root / f't/test_{k}.png')
    words = ['from-masks', '--classes', *CLASSES[1:], '--photos', str(root / 'p'), '--masks', str(root / 'm')]
    return [*words, '--test', str(root / 't'), '--overwrite', '--out']


def assert_whole_or_absent(out: Path) -> int | None:
    """Check that each photo has the label of its grey; return the class that all have, None for no set."""
    if not (out / 'train_all.json').exists():
        with pytest.raises(BadInput, match='has no annotations|no such folder'):
            read_coco(out, 'train', Competition(classes=CLASSES))
        return None
    coco = read_coco(out, 'train', read_competition(out))
    (k,) = {int(draw_mask(photo).max()) for photo in coco.photos}
    assert all((read_photo(coco, photo) == GREYS[k]).all() for photo in coco.photos)
    tests = read_coco(out, 'test', coco.competition)
    assert [photo.file_name for photo in tests.photos] == [f'test_{k}.png']
    assert (read_photo(tests, tests.photos[0]) == GREYS[k]).all()
    return k


def kill_at(step: int, words: list[str]) -> bool:
    """Import in a process that dies at a step of writing; return True if the import ended before it."""
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, args: tuple) -> None:
            nonlocal left
            if event in ('os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'shutil.rmtree'):
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            prepare.command(words)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_import_that_is_killed_leaves_a_whole_set_or_none(tmp_path):
    """Import over an earlier set, die at each step of it, look, and complete it with the same command."""
    dark, light = write_source(tmp_path / '1', 1), write_source(tmp_path / '2', 2, names='bc')
    prepare.command([*dark, str(tmp_path / 'first')])
    assert assert_whole_or_absent(tmp_path / 'first') == 1
    seen = []
    for step in range(200):
        out = tmp_path / f'out{step}'
        shutil.copytree(tmp_path / 'first', out)
        done = kill_at(step, [*light, str(out)])
        seen.append(assert_whole_or_absent(out))
        if done:
            break
        words = [*light, str(out)]
        prepare.command(words if seen[-1] else [word for word in words if word != '--overwrite'])
        assert assert_whole_or_absent(out) == 2
        photos = {path.relative_to(out).as_posix() for path in out.rglob('*.png')}
        assert photos == {'b.png', 'c.png', 'test_2.png'}  # those of the earlier set are gone
        assert not {path.name for path in out.iterdir() if path.name.startswith('.')} - {'.import.lock'}
    assert done and seen[0] == 1 and None in seen and seen[-1] == 2


def test_imports_that_are_killed_by_a_signal(tmp_path):
    words, out = write_source(tmp_path / '1', 1), tmp_path / 'out'
    other = write_source(tmp_path / '2', 2)
    prepare.command([*words, str(out)])
    rng = np.random.default_rng(0)
    code = 'import prepare, sys; print("ready", flush=True); prepare.command(sys.argv[1:])'
    for some in (other, words, other):
        command = [sys.executable, '-c', code, *some, str(out)]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.06))
            process.kill()
        assert_whole_or_absent(out)


@pytest.mark.parametrize('name', ['competition.yaml', 'test.json', 'train_all.json'])
def test_a_full_disk_leaves_the_earlier_set(tmp_path, monkeypatch, name):
    """Find no room for a file beside the photos, which are small in many sets of masks."""
    out = tmp_path / 'out'
    prepare.command([*write_source(tmp_path / '1', 1), str(out)])
    write = files.write_whole

    def write_until(path, *args):
        if Path(path).name == name:
            raise Interrupted(f'{path}: cannot be written: No space left on device')
        return write(path, *args)

    monkeypatch.setattr(files, 'write_whole', write_until)
    with pytest.raises(Interrupted, match='No space left'):
        prepare.command([*write_source(tmp_path / '2', 2), str(out)])
    assert assert_whole_or_absent(out) == 1
    assert not {path.name for path in out.iterdir() if path.name.startswith('.')} - {'.import.lock'}
    monkeypatch.undo()
    prepare.command([*write_source(tmp_path / '3', 2), str(out)])
    assert assert_whole_or_absent(out) == 2


def test_two_imports_at_once(tmp_path):
    """One of them writes, and the other says so, or comes after it; never a mixture."""
    sources = [write_source(tmp_path / f'{k}', k) for k in (1, 2)]
    out = tmp_path / 'out'
    commands = [[sys.executable, 'prepare.py', *words, str(out)] for words in sources]
    pipes = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.PIPE, 'text': True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for command in commands]
    errors = [process.communicate()[1] for process in processes]
    statuses = [process.returncode for process in processes]
    assert 0 in statuses and set(statuses) <= {0, 2}
    assert all('is importing a data set here now' in error for error in errors if error)
    assert assert_whole_or_absent(out) in (1, 2)


def test_an_import_waits_for_nobody_and_checks_again(tmp_path, monkeypatch):
    words, out = [*write_source(tmp_path / '1', 1)[:-2], '--out', str(tmp_path / 'out')], tmp_path / 'out'
    with (
        lock(out / '.import.lock', 'importing a data set'),
        pytest.raises(BadInput, match='importing .* here now'),
    ):
        prepare.command(words)
    later = importers.common_range

    def import_another(facts):
        monkeypatch.setattr(importers, 'common_range', later)
        prepare.command([*write_source(tmp_path / '2', 2), str(out)])
        return later(facts)

    monkeypatch.setattr(importers, 'common_range', import_another)
    with pytest.raises(BadInput, match='train_all.json: already exists'):
        prepare.command(words)
    assert assert_whole_or_absent(out) == 2


@pytest.mark.parametrize('options', [[], ['--overwrite']])
def test_a_folder_of_something_else_is_no_place_for_a_set(tmp_path, options):
    words = [*write_source(tmp_path / '1', 1)[:-2], *options, '--out', str(tmp_path / 'out')]
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/a.png').write_text('mine')
    with pytest.raises(BadInput, match=r'is not empty, and not a data set \(a.png\); give another --out'):
        prepare.command(words)
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['a.png']


@pytest.mark.parametrize(
    ('out', 'message'),
    [
        ('1/p', 'is .*1/p'),
        ('1/m/set', 'lies inside .*1/m'),
        ('1', 'contains .*1/p'),
        ('1/t/../t/x', 'lies inside .*1/t'),
    ],
)
def test_a_set_is_not_written_into_its_source(tmp_path, out, message):
    words = write_source(tmp_path / '1', 1)
    (tmp_path / '1/train_all.json').write_text('{}')
    with pytest.raises(BadInput, match=rf'{message}, which is imported|is not empty'):
        prepare.command([*words, str(tmp_path / out)])
    assert len(list((tmp_path / '1').rglob('*'))) == 9


def test_photos_of_a_set_that_was_not_imported_stay(tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'mine.png').write_text('mine')
    record = {'images': [{'id': 0, 'file_name': 'mine.png', 'height': 1, 'width': 1}]}
    (out / 'train.json').write_text(json.dumps(record))
    (out / 'val.json').write_text(json.dumps(record))
    words = write_source(tmp_path / '1', 1)
    with pytest.raises(BadInput, match='train.json: already exists'):
        prepare.command([*words[:-2], '--out', str(out)])
    prepare.command([*words, str(out)])
    assert assert_whole_or_absent(out) == 1 and (out / 'mine.png').read_text() == 'mine'
    assert not (out / 'train.json').exists() and not (out / 'val.json').exists()


def test_a_photo_that_cannot_be_read_leaves_the_earlier_set(tmp_path):
    dark, light, out = write_source(tmp_path / '1', 1), write_source(tmp_path / '2', 2), tmp_path / 'out'
    prepare.command([*dark, str(out)])
    before = {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
    (tmp_path / '2/t/test_2.png').write_bytes(b'no photo')
    with pytest.raises(BadInput, match='test_2.png: cannot be decoded'):
        prepare.command([*light, str(out)])
    assert {path: path.read_bytes() for path in out.rglob('*') if path.is_file()} == before


def test_a_folder_in_the_place_of_a_photo(tmp_path):
    dark, out = write_source(tmp_path / '1', 1), tmp_path / 'out'
    prepare.command([*dark, str(out)])
    (tmp_path / '1/p/a.png').rename(tmp_path / '1/p/n.png')
    (tmp_path / '1/m/a.png').rename(tmp_path / '1/m/n.png')
    (out / 'n.png').mkdir()
    with pytest.raises(
        BadInput, match='n.png: cannot be written: a folder or a file of that name is in the way'
    ):
        prepare.command([*dark, str(out)])
    assert assert_whole_or_absent(out) == 1
