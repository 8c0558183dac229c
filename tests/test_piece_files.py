"""infer.py --image with a folder, a video or a photo, and a folder as --out: its files, what is refused, and
how an interrupted run goes on.
"""

import csv
import json
import shutil
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from test_own_size import make_runs

import infer
from data.mask_pairs import class_folders
from data.video import Video, is_video
from engine import piece_files
from engine.pieces import Limits
from utils.errors import BadInput, CheckFailed, Interrupted

FRAMES, FPS = 12, 4


@pytest.fixture(scope='module', params=['multiclass', 'multilabel'])
def both(request, tmp_path_factory) -> Path:
    """The folder of two untrained folds of classes that may overlap, or not."""
    root = tmp_path_factory.mktemp(request.param)
    make_runs(root, request.param)
    return root


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('runs')
    make_runs(root, 'multiclass')
    return root


@pytest.fixture
def photos(runs, tmp_path) -> Path:
    """Five photos whose names are alike, and what systems leave beside photos."""
    folder = tmp_path / 'photos'
    for name in ('a.jpg', 'a.png', 'a.jpg.png', 'b/a.png', 'c/d/e.png'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(runs / 'data/001.png').save(folder / name)
    for junk in ('._a.jpg', 'Thumbs.db', '.DS_Store', '__MACOSX/a.png', 'notes.txt'):
        (folder / junk).parent.mkdir(exist_ok=True)
        (folder / junk).write_bytes(b'junk')
    return folder


@pytest.fixture(scope='module')
def video(tmp_path_factory) -> Path:
    """A video of 12 frames, four a second, each brighter than the one before; its left half is red."""
    path = tmp_path_factory.mktemp('video') / 'belt.mp4'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), FPS, (128, 96))
    for n in range(FRAMES):
        frame = np.full((96, 128, 3), 10 * n + 40, np.uint8)
        frame[:, :64] = 0, 0, 200
        writer.write(frame)
    writer.release()
    return path


def predict(root: Path, image: Path, out: Path, *words: str, fold: str = '0') -> None:
    start = ['--cfg', str(root / 'own.yaml'), '--fold', fold, '--image', str(image), '--out', str(out)]
    infer.command([*start, *words])


def read(out: Path) -> list[dict[str, str]]:
    with (out / 'pieces.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def files_of(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob('*') if path.is_file()}


def test_a_photo_with_an_overlay_a_mask_and_lines_that_agree(both, tmp_path, capsys):
    out, photo = tmp_path / 'out', both / 'data/001.png'
    predict(both, photo, out, '--min-confidence', '0.4', '--min-share', '0.01', fold='all')
    size = Image.open(photo).size
    assert Image.open(out / 'overlays/001.png.jpg').size == size
    is_multilabel = 'multilabel' in str(both)
    folders = class_folders(('red', 'green', 'blue')) if is_multilabel else ['']
    masks = [np.array(Image.open(out / 'masks' / folder / '001.png.png')) for folder in folders]
    assert all(mask.shape == size[::-1] and mask.dtype == np.uint8 for mask in masks)
    rows = read(out)
    assert rows and all(row['file'] == '001.png' and row['frame'] == row['seconds'] == '' for row in rows)
    assert [row['piece'] for row in rows] == [str(n + 1) for n in range(int(rows[0]['pieces']))]
    for row in rows:
        assert (row['bin'] == 'Not sure') == (float(row['confidence']) < 0.4)
        x, y, width, height = (int(row[key]) for key in ('x', 'y', 'width', 'height'))
        k = ['Background', 'red', 'green', 'blue'].index(row['class'])
        plane = masks[k - 1] == 1 if is_multilabel else masks[0] == k
        assert 0.01 <= float(row['share']) <= 1 and plane[y : y + height, x : x + width].any()
    lines = capsys.readouterr().out.splitlines()
    assert f'1 photo, {len(rows)} piece' in lines[-2] and 'not sure (below 0.4)' in lines[-2]
    assert f'wrote {out}' in lines[-1] and 'photos a second' in lines[-1]


def test_the_same_mask_as_that_of_the_overlay_alone(runs, tmp_path, capsys):
    photo = runs / 'data/001.png'
    predict(runs, photo, tmp_path / 'o.png')
    shares = capsys.readouterr().out
    predict(runs, photo, tmp_path / 'out')
    ids = np.array(Image.open(tmp_path / 'out/masks/001.png.png'))
    for k, name in enumerate(('Background', 'red', 'green', 'blue')):
        if (share := (ids == k).mean()) >= 0.0005:
            assert f'{name} {share:.1%}' in shares


def test_names_that_are_alike_are_kept_apart(runs, photos, tmp_path, capsys):
    out = tmp_path / 'out'
    predict(runs, photos, out)
    names = ['a.jpg', 'a.jpg.png', 'a.png', 'b/a.png', 'c/d/e.png']
    assert [*dict.fromkeys(row['file'] for row in read(out))] == names
    for folder, end in (('masks', '.png'), ('overlays', '.jpg')):
        found = {path.relative_to(out / folder).as_posix() for path in (out / folder).rglob('*.*')}
        assert found == {f'{name}{end}' for name in names}
    assert '5 photos, ' in capsys.readouterr().out


def test_batches_give_the_same_as_one_by_one(runs, photos, tmp_path):
    for name, size in (('f.png', (60, 50)), ('g.png', (50, 60)), ('h.png', (60, 50))):
        Image.open(runs / 'data/001.png').resize(size).save(photos / name)
    predict(runs, photos, tmp_path / 'many')
    predict(runs, photos, tmp_path / 'one', '--set', 'infer_batch_size=1')
    many, one = (files_of(tmp_path / name) for name in ('many', 'one'))
    masks = [name for name in many if name.startswith('masks')]
    assert len(masks) == 8 and many.keys() == one.keys()
    for name in masks:
        pair = [np.array(Image.open(tmp_path / folder / name)) for folder in ('many', 'one')]
        assert (pair[0] != pair[1]).mean() < 0.01, name


def test_a_broken_photo_among_good_ones(runs, photos, tmp_path, capsys):
    out = tmp_path / 'out'
    (photos / 'broken.jpg').write_bytes(b'\xff\xd8\xff\xe0 no photo')
    (photos / 'phone.heic').write_bytes(b'\0\0\0\x18ftypheic\0\0\0\0')
    with pytest.raises(CheckFailed, match='2 of 7 photos cannot be predicted'):
        predict(runs, photos, out)
    said = capsys.readouterr().out
    assert f'warning: {photos}/broken.jpg: ' in said and 'phone.heic: found HEIC' in said
    assert len({row['file'] for row in read(out)}) == 5
    before = files_of(out)
    Image.open(runs / 'data/001.png').save(photos / 'broken.jpg')
    (photos / 'phone.heic').unlink()
    predict(runs, photos, out)
    after = files_of(out)
    assert '5 photos done before; going on' in capsys.readouterr().out
    assert len(after) == len(before) + 2 and 'masks/broken.jpg.png' in after
    with pytest.raises(BadInput, match='holds these predictions already; give another --out, or --overwrite'):
        predict(runs, photos, out)
    assert files_of(out) == after


def test_an_interrupted_run_goes_on(runs, photos, tmp_path, monkeypatch):
    out, whole = tmp_path / 'out', tmp_path / 'whole'
    options = ('--set', 'infer_batch_size=2')
    predict(runs, photos, whole, *options)
    write, seen = piece_files.PieceFiles.write, []

    def stop(self, item, mask):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(item.name)
        write(self, item, mask)

    monkeypatch.setattr(piece_files.PieceFiles, 'write', stop)
    with pytest.raises(Interrupted, match='2 photos or frames are done; the same command goes on'):
        predict(runs, photos, out, *options)
    monkeypatch.undo()
    with (out / 'pieces.csv').open('a') as file:
        file.write('a.png,,,1,')  # cut off by a kill
    stamp = (out / 'masks/a.jpg.png').stat().st_mtime_ns
    for words, key in ((('--min-share', '0.1'), 'share'), (('--fold', '1'), 'model')):
        with pytest.raises(BadInput, match=f'was made with another {key}; give another --out'):
            predict(runs, photos, out, *options, *words)
    predict(runs, photos, out, *options)
    assert (out / 'masks/a.jpg.png').stat().st_mtime_ns == stamp
    assert files_of(out) == files_of(whole)


def test_lines_of_a_photo_that_are_not_all_there_are_removed(tmp_path):
    path = tmp_path / 'pieces.csv'
    head = ','.join(piece_files.COLUMNS)
    rest = 'Metal,Cans,0.1,0.9,1,2,3,4'
    good = f'{head}\na.png,,,1,2,{rest}\na.png,,,2,2,{rest}\nb.png,,,,0,,,,,,,,\n'
    for end in (f'c.png,,,1,2,{rest}\n', f'c.png,,,1,1,{rest}', 'c.png,,,', 'c'):
        path.write_text(good + end)
        done = piece_files.keep_whole_photos(path)
        assert path.read_text() == good, end
        assert (done.files, done.count, done.pieces) == ({'a.png', 'b.png'}, 2, 2)
    path.write_text(good.replace('1,2,Metal', '1,x,Metal'))
    with pytest.raises(BadInput, match='is damaged'):
        piece_files.keep_whole_photos(path)


def test_folders_that_are_not_written_into(runs, photos, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/masks').write_text('precious')
    (tmp_path / 'file').write_text('precious')
    before = files_of(tmp_path)
    cases = {
        'mine': 'is not empty, and not a folder of predictions .masks.; give another --out',
        'file': 'is a file, expected a folder',
        'photos': 'is not empty',
    }
    for name, message in cases.items():
        with pytest.raises(BadInput, match=message):
            predict(runs, photos, tmp_path / name, '--overwrite')
    assert files_of(tmp_path) == before
    predict(runs, photos, photos / 'out')
    rows = read(photos / 'out')
    predict(runs, photos, photos / 'out', '--overwrite', '--min-share', '1')  # the masks in it are no photos
    assert [row['file'] for row in read(photos / 'out')] == [*dict.fromkeys(row['file'] for row in rows)]
    assert json.loads((photos / 'out/run.json').read_text())['settings']['share'] == 1


def test_inputs_that_are_none(runs, photos, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty/._x.jpg').write_bytes(b'junk')
    (tmp_path / 'texts').mkdir()
    for path in ('texts/a.txt', 'notes.txt', 'list.m3u8', 'film.mp4'):
        (tmp_path / path).write_text('#EXTM3U\n/etc/passwd\n')
    cases = {
        'empty': 'empty: is empty, expected .bmp, .jfif',
        'texts': 'texts: found no photos, expected .bmp, .jfif',
        'notes.txt': 'notes.txt: cannot be decoded, expected an image.*; or give a video, or a folder',
        'list.m3u8': 'list.m3u8: cannot be decoded, expected an image',
        'film.mp4': 'film.mp4: cannot be decoded, expected an image',
        'none.mp4': 'none.mp4: no such file or folder',
    }
    for name, message in cases.items():
        with pytest.raises(BadInput, match=message):
            predict(runs, tmp_path / name, tmp_path / 'out')
    (tmp_path / 'bad.jpg').write_bytes(b'\xff\xd8\xff\xe0 no photo')
    with pytest.raises(BadInput, match='bad.jpg: cannot be decoded'):
        predict(runs, tmp_path / 'bad.jpg', tmp_path / 'out')
    with pytest.raises(BadInput, match='photos: --every is for a video'):
        predict(runs, photos, tmp_path / 'out', '--every', '2')
    with pytest.raises(BadInput, match='photos: give a folder as --out, for the masks'):
        predict(runs, photos, tmp_path / 'out.png')
    for words in (['--every', '2'], ['--overwrite'], ['--min-share', '0']):
        with pytest.raises(SystemExit):
            predict(runs, photos / 'a.jpg', tmp_path / 'out.png', *words)
        assert f'{words[0]} goes with --image and a folder as --out' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        predict(runs, photos, tmp_path / 'out', '--min-confidence', 'nan')
    assert "found 'nan', expected a number from 0 to 1" in capsys.readouterr().err


def test_the_help_says_the_defaults_that_hold(capsys):
    with pytest.raises(SystemExit):
        infer.command(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    limits = Limits()
    assert f'is not sure; {limits.confidence} by default' in text
    assert f'left out of pieces.csv; {limits.share} by default' in text


# --- videos -------------------------------------------------------------------------------------------------


def atoms(content: bytes) -> dict[bytes, bytes]:
    """The parts of an MP4 file by their names."""
    parts, place = {}, 0
    while place < len(content):
        (length,) = struct.unpack('>I', content[place : place + 4])
        parts[content[place + 4 : place + 8]] = content[place : place + length]
        place += length
    return parts


def with_index_first(content: bytes) -> bytes:
    """An MP4 file with its index before the frames, so that the beginning of the file can be played."""
    parts = atoms(content)
    index, rest = parts.pop(b'moov'), parts
    place = index.index(b'stco') + 8
    (count,) = struct.unpack('>I', index[place : place + 4])
    form, end = f'>{count}I', place + 4 + 4 * count
    offsets = [offset + len(index) for offset in struct.unpack(form, index[place + 4 : end])]
    index = index[: place + 4] + struct.pack(form, *offsets) + index[end:]
    return rest.pop(b'ftyp') + index + b''.join(rest.values())


def test_frames_of_a_video(runs, video, tmp_path, capfd):
    out = tmp_path / 'out'
    predict(runs, video, out)
    rows = read(out)
    times = {row['frame']: row['seconds'] for row in rows}
    assert times == {'0': '0.000', '2': '0.500', '4': '1.000', '6': '1.500', '8': '2.000', '10': '2.500'}
    assert {row['file'] for row in rows} == {'belt.mp4'}
    assert Image.open(out / 'masks/belt.mp4/000010.png').size == (128, 96)
    said = capfd.readouterr()
    assert '6 frames (1 of 2, 4 a second), ' in said.out and 'frames a second' in said.out
    predict(runs, video, tmp_path / 'fifth', '--every', '5')
    assert [*dict.fromkeys(row['frame'] for row in read(tmp_path / 'fifth'))] == ['0', '5', '10']


def test_an_interrupted_video_goes_on(runs, video, tmp_path):
    predict(runs, video, tmp_path / 'out', '--set', 'infer_batch_size=1')
    shutil.copytree(tmp_path / 'out', tmp_path / 'whole')
    run = tmp_path / 'out/run.json'
    run.write_text(run.read_text().replace('"finished": true', '"finished": false'))
    rows = (tmp_path / 'out/pieces.csv').read_text().splitlines(True)
    first = [row for row in rows[1:] if row.split(',')[1] in '024']
    (tmp_path / 'out/pieces.csv').write_text(''.join(rows[:1] + first))
    (tmp_path / 'out/masks/belt.mp4/000002.png').write_bytes(b'kept')
    predict(runs, video, tmp_path / 'out')
    assert [row['frame'] for row in read(tmp_path / 'out')] == [
        row['frame'] for row in read(tmp_path / 'whole')
    ]
    assert (tmp_path / 'out/masks/belt.mp4/000002.png').read_bytes() == b'kept'


def test_a_video_that_ends_early(runs, video, tmp_path, capfd):
    content = with_index_first(video.read_bytes())
    (tmp_path / 'whole.mp4').write_bytes(content)
    start = content.index(b'mdat')
    (tmp_path / 'cut.mp4').write_bytes(content[: start + (len(content) - start) // 2])
    with Video(tmp_path / 'whole.mp4') as whole:
        assert len(list(whole.frames())) == FRAMES and whole.fault == ''
    with pytest.raises(CheckFailed, match=r'cut.mp4: only \d of 12 frames can be decoded: .* is written'):
        predict(runs, tmp_path / 'cut.mp4', tmp_path / 'out', '--every', '1')
    frames = {row['frame'] for row in read(tmp_path / 'out')}
    assert 0 < len(frames) < FRAMES
    assert capfd.readouterr().err == ''  # FFmpeg says nothing of its own
    (tmp_path / 'none.mp4').write_bytes(video.read_bytes()[:2000])
    with pytest.raises(BadInput, match='none.mp4: no frame can be decoded: it is cut off or damaged'):
        predict(runs, tmp_path / 'none.mp4', tmp_path / 'none')
    assert not (tmp_path / 'none').exists() and capfd.readouterr().err == ''


def test_a_phone_that_was_turned(video, tmp_path):
    content = video.read_bytes()
    place = content.index(b'tkhd') + 44  # its matrix, of 9 numbers
    turned = struct.pack('>9i', 0, 1 << 16, 0, -1 << 16, 0, 0, 96 << 16, 0, 1 << 30)
    (tmp_path / 'turned.mp4').write_bytes(content[:place] + turned + content[place + 36 :])
    for path, size in ((video, (96, 128)), (tmp_path / 'turned.mp4', (128, 96))):
        with Video(path) as opened:
            photo = next(opened.frames()).photo
        assert photo.shape == (*size, 3)
    red, grey = photo[5, 48].astype(int), photo[-5, 48].astype(int)
    assert red[0] > 150 > red[1] and abs(grey - 40).max() < 20  # as RGB, and the left half is above


def test_a_video_for_a_model_of_other_bands(runs, video, tmp_path):
    shutil.copytree(runs / 'data', tmp_path / 'data')
    path = tmp_path / 'data/competition.yaml'
    path.write_text(path.read_text() + 'channels: 4\n')
    with pytest.raises(BadInput, match='a video is RGB of 8 bits, but the model was trained on other photos'):
        predict(runs, video, tmp_path / 'out', '--set', f'data_root={tmp_path / "data"}')


def test_files_that_begin_as_videos_do(video, tmp_path):
    kinds = {
        b'\0\0\0\x18ftypisom': True,
        b'\x1aE\xdf\xa3': True,
        b'RIFF\0\0\0\0AVI LIST': True,
        (b'G' + bytes(187)) * 6: True,
        b'\0\0\0\x18ftypheic': False,
        b'RIFF\0\0\0\0WEBP': False,
        b'#EXTM3U\n': False,
        b'GIF89a' + bytes(100): False,
        b'': False,
    }
    for content, expected in kinds.items():
        (tmp_path / 'x').write_bytes(content)
        assert is_video(tmp_path / 'x') == expected, content[:20]
    with pytest.raises(BadInput, match='cannot be read: No such file'):
        is_video(tmp_path / 'none')
