"""Test prepare.py taco with a local server that fails in the ways of real servers."""

import csv
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

import prepare
from config import CLASSES, HOME
from data import download
from data import taco as taco_module
from data.coco import draw_mask, read_coco, read_photo
from data.photos import read_rgb
from utils.cli import run_script
from utils.errors import BadInput, CheckFailed

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 60, 80
BOX = (10, 20, 30, 40)  # x y w h of a red rectangle, in the upright photo


class PhotoServer(ThreadingHTTPServer):
    """Serve photos by path. Its first requests get the `faults` of the path: a status, 'cut' for a truncated
    body, or seconds to wait.
    """

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), PhotoHandler)
        self.photos: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.asked: Counter = Counter()

    def handle_error(self, *_) -> None:
        """Print nothing about a client that did not wait."""


class PhotoHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        server.asked[self.path] += 1
        fault = server.faults.get(self.path, []).pop(0) if server.faults.get(self.path) else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        if isinstance(fault, float):
            time.sleep(fault)
        content = server.photos.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == 'cut' else content)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, 'BACKOFF', 0.01)
    with PhotoServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def photo_bytes(orientation: int = 1, kind: str = 'png', size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    """Draw a red BOX on grey, stored so that its EXIF orientation turns it upright."""
    image = Image.new('RGB', size, (90, 90, 90))
    x, y, w, h = BOX
    image.paste((230, 20, 20), (x, y, x + w, y + h))
    inverse = {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    image = image if inverse is None else image.transpose(inverse)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=exif, **({'quality': 97} if kind == 'jpeg' else {}))
    return file.getvalue()


def write_annotations(path: Path, server: PhotoServer, names: list[str]) -> Path:
    """Write annotations like TACO's: one rectangle, a drink can, in each photo."""
    host, port = server.server_address
    x, y, w, h = BOX
    images = [
        {
            'id': 10 + i,
            'file_name': f'batch_1/{name}.jpg',
            'width': WIDTH,
            'height': HEIGHT,
            'flickr_url': f'http://{host}:{port}/{name}',
        }
        for i, name in enumerate(names)
    ]
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    annotations = [
        {
            'id': 1,
            'image_id': image['id'],
            'category_id': 12,
            'segmentation': [polygon],
            'area': w * h,
            'bbox': list(BOX),
            'iscrowd': 0,
        }
        for image in images
    ]
    categories = [{'id': 12, 'name': 'Drink can'}]
    path.write_text(json.dumps({'images': images, 'annotations': annotations, 'categories': categories}))
    return path


def run(annotations: Path, out: Path, *options: str) -> None:
    places = ['--annotations', str(annotations), '--out', str(out)]
    prepare.command(['taco', *places, '--mirror', '127.0.0.1', *options])


def assert_aligned(out: Path, count: int) -> None:
    """Check that every photo is 512x512 and red where its mask is Metal, except along its edges."""
    coco = read_coco(out, 'train', HOME)
    assert len(coco.photos) == count
    for photo in coco.photos:
        image, mask = read_photo(coco, photo), draw_mask(photo)
        assert image.shape == (512, 512, 3) and set(np.unique(mask)) == {0, CLASSES.index('Metal')}
        red = image[..., 0] > 160
        inner = cv2.erode((mask > 0).astype(np.uint8), np.ones((19, 19)))
        outer = cv2.dilate((mask > 0).astype(np.uint8), np.ones((19, 19)))
        assert red[inner > 0].all() and not red[outer == 0].any(), photo.file_name


def test_photos_of_every_orientation_lie_under_their_masks(server, tmp_path, capsys):
    for orientation in (1, 3, 6, 8):
        for kind in ('png', 'jpeg'):
            server.photos[f'/{kind}{orientation}'] = photo_bytes(orientation, kind)
    # an upright photo that still has the orientation of the camera
    upright = Image.open(io.BytesIO(photo_bytes()))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    upright.save(file, 'jpeg', exif=exif, quality=97)
    server.photos['/leftover'] = file.getvalue()
    names = [path[1:] for path in server.photos]
    run(write_annotations(tmp_path / 'a.json', server, names), tmp_path / 'out')
    assert_aligned(tmp_path / 'out', len(names))
    assert not (tmp_path / 'out/missing.csv').exists()
    prepare.command(['check', '--data', str(tmp_path / 'out')])
    assert 'nothing else wrong found' in capsys.readouterr().out


def test_temporary_faults_are_retried(server, tmp_path):
    faults = {'busy': [503, 429, 500], 'cut': ['cut', 'cut'], 'slow': [0.3], 'fine': []}
    for name, sequence in faults.items():
        server.photos[f'/{name}'], server.faults[f'/{name}'] = photo_bytes(kind='jpeg'), list(sequence)
    run(write_annotations(tmp_path / 'a.json', server, list(faults)), tmp_path / 'out', '--retries', '3')
    assert_aligned(tmp_path / 'out', len(faults))
    assert server.asked == {'/busy': 4, '/cut': 3, '/slow': 1, '/fine': 1}


def test_missing_photos_are_left_out_and_listed(server, tmp_path, capsys, monkeypatch):
    whole = photo_bytes(kind='jpeg')
    server.photos = {
        '/fine': whole,
        '/busy': whole,
        '/cut': whole,
        '/slow': whole,
        '/broken': whole[: len(whole) // 2],
        '/page': b'<html>no longer here</html>',
        '/other': photo_bytes(size=(64, 64)),
        '/lying': photo_bytes(size=(HEIGHT, WIDTH)),
    }
    server.faults = {'/busy': [503] * 9, '/cut': ['cut'] * 9, '/slow': [2.0] * 9}
    monkeypatch.setattr(download, 'IDLE', 0.8)
    names = [*(path[1:] for path in server.photos), 'gone']
    annotations, out = write_annotations(tmp_path / 'a.json', server, names), tmp_path / 'out'
    with pytest.raises(CheckFailed, match='8 of 9 photos are missing and left out of train_all'):
        run(annotations, out, '--retries', '2')
    assert_aligned(out, 1)
    assert [path.name for path in sorted((out / 'batch_1').iterdir())] == ['fine.jpg']
    with (out / 'missing.csv').open(newline='') as file:
        why = {Path(row['file_name']).stem: row['why'] for row in csv.DictReader(file)}
    assert why.pop('busy') == 'the server answers 503 Service Unavailable'
    assert why.pop('gone') == 'the server answers 404 Not Found'
    assert why.pop('other') == 'found 64x64 pixels, its record says 60x80'
    assert why.pop('lying') == 'found 80x60 pixels, its record says 60x80'
    assert 'cannot be decoded' in why.pop('broken') and 'seems to be a web page' in why.pop('page')
    assert 'timed out' in why.pop('slow')
    assert re.search('IncompleteRead|broken', why.pop('cut'))
    assert not why
    printed = capsys.readouterr().out
    assert printed.count('missing: batch_1/') == 8 and 'batch_1/gone.jpg: the server answers 404' in printed
    assert server.asked['/busy'] == 3 and server.asked['/gone'] == 1  # 404 is not retried

    # the same command again downloads the missing photos alone
    server.faults, server.asked = {}, Counter()
    server.photos |= dict.fromkeys(('/broken', '/page', '/other', '/lying', '/gone'), whole)
    run(annotations, out)
    assert_aligned(out, 9)
    assert '/fine' not in server.asked and not (out / 'missing.csv').exists()


def test_all_photos_missing(server, tmp_path, monkeypatch, capfd):
    annotations = write_annotations(tmp_path / 'a.json', server, ['gone'])
    words = ['taco', '--mirror', '127.0.0.1', '--annotations', str(annotations)]
    monkeypatch.setattr(sys, 'argv', ['prepare.py', *words, '--out', str(tmp_path / 'out')])
    with pytest.raises(SystemExit) as stopped:
        run_script(prepare.command)
    error = capfd.readouterr().err
    assert stopped.value.code == 1 and 'all 1 photos are missing' in error
    assert not (tmp_path / 'out/train_all.json').exists()


@pytest.mark.parametrize('stop', [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_stopped_continues(server, tmp_path, stop):
    names = [f'{i}' for i in range(12)]
    for name in names:
        server.photos[f'/{name}'] = photo_bytes(kind='jpeg')
    for name in names[6:]:
        server.faults[f'/{name}'] = [30.0] if stop == signal.SIGKILL else [1.0]
    annotations, out = write_annotations(tmp_path / 'a.json', server, names), tmp_path / 'out'
    words = ['prepare.py', 'taco', '--annotations', str(annotations), '--out', str(out)]
    words += ['--workers', '2', '--mirror', '127.0.0.1']
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while len(list(out.glob('batch_1/*.jpg'))) < 6 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(stop)
        error = process.communicate()[1]
    if stop == signal.SIGTERM:
        assert process.returncode == 75 and error.splitlines()[-1] == 'prepare.py: interrupted'
    assert not (out / 'train_all.json').exists()
    done = {path.stem for path in out.glob('batch_1/*.jpg')}
    assert set(names[:6]) <= done < set(names)
    for path in out.glob('batch_1/*.jpg'):
        read_rgb(path, expected=(512, 512))
    server.faults, server.asked = {}, Counter()
    run(annotations, out)
    assert_aligned(out, 12)
    assert server.asked.keys() == {f'/{name}' for name in set(names) - done}


def test_a_half_file_under_the_final_name_is_replaced(server, tmp_path):
    server.photos['/a'] = photo_bytes(kind='jpeg')
    annotations, out = write_annotations(tmp_path / 'a.json', server, ['a']), tmp_path / 'out'
    run(annotations, out)
    path = out / 'batch_1/a.jpg'
    path.write_bytes(path.read_bytes()[:1000])
    partial = path.with_name('.a.jpg.123.partial')  # from a run that was killed
    partial.write_bytes(b'half')
    run(annotations, out)
    assert_aligned(out, 1)
    assert not partial.exists()


def test_photos_from_a_folder(server, tmp_path):
    (tmp_path / 'photos/batch_1').mkdir(parents=True)
    (tmp_path / 'photos/batch_1/a.jpg').write_bytes(photo_bytes(6, 'jpeg'))
    annotations = write_annotations(tmp_path / 'a.json', server, ['a', 'b'])
    with pytest.raises(CheckFailed, match='1 of 2 photos are missing'):
        run(annotations, tmp_path / 'out', '--photos', str(tmp_path / 'photos'))
    assert_aligned(tmp_path / 'out', 1)
    assert not server.asked
    assert 'b.jpg: No such file' in (tmp_path / 'out/missing.csv').read_text()


def change(path: Path, key: str, value) -> None:
    data = json.loads(path.read_text())
    data['annotations' if key == 'area' else 'images'][0][key] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('file_name', '../a.jpg', 'leads out of'),
        ('file_name', 'a.py', 'ends in .jpg'),
        ('file_name', 'a\0.jpg', 'is not a file name'),
        ('file_name', '\ud800.jpg', 'is not a file name'),
        ('file_name', f'{"a" * 300}.jpg', 'is not a file name'),
        ('flickr_url', 'file:///etc/passwd', r'expected http\(s\)'),
        ('flickr_url', None, 'not the annotations of TACO'),
        ('width', 0, 'not the annotations of TACO'),
        pytest.param('area', 10**400, 'not the annotations of TACO', id='area of 401 digits'),
    ],
)
def test_records_that_are_refused(server, tmp_path, key, value, message):
    annotations = write_annotations(tmp_path / 'a.json', server, ['a'])
    change(annotations, key, value)
    with pytest.raises(BadInput, match=message):
        run(annotations, tmp_path / 'out')
    assert not server.asked and not (tmp_path / 'out').exists()


def test_table_is_read_and_checked(server, tmp_path, monkeypatch):
    server.photos['/a'] = photo_bytes()
    annotations, table = write_annotations(tmp_path / 'a.json', server, ['a']), tmp_path / 'table.csv'
    monkeypatch.setattr(taco_module, 'TABLE', table)
    for text, message in (
        (
            'category,class\nDrink can,Tin\n',
            "category 'Drink can' has the class 'Tin', expected one",
        ),
        ('category,class\nShoe,Clothing\n', "lacks the category 'Drink can'"),
        ('a,b\nShoe,Clothing\n', "found the header 'a,b', expected 'category,class'"),
    ):
        table.write_text(text)
        with pytest.raises(BadInput, match=message):
            run(annotations, tmp_path / 'out')
    table.write_text('category,class\nDrink can,Glass\n')
    run(annotations, tmp_path / 'out')
    mask = draw_mask(read_coco(tmp_path / 'out', 'train', HOME).photos[0])
    assert set(np.unique(mask)) == {0, CLASSES.index('Glass')}


def test_another_training_set_stays(server, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/train_all.json').write_text('mine')
    server.photos['/a'] = photo_bytes()
    annotations = write_annotations(tmp_path / 'a.json', server, ['a'])
    with pytest.raises(BadInput, match='already exists; give another --out, or --overwrite'):
        run(annotations, tmp_path / 'out')
    assert (tmp_path / 'out/train_all.json').read_text() == 'mine'
    run(annotations, tmp_path / 'out', '--overwrite')
    assert_aligned(tmp_path / 'out', 1)


@pytest.mark.parametrize('content', [{'images': [], 'categories': []}, {'images': [{}]}, {'images': 3}])
def test_other_json_is_refused(tmp_path, content):
    (tmp_path / 'a.json').write_text(json.dumps(content))
    with pytest.raises(BadInput, match='not the annotations of TACO|no images'):
        run(tmp_path / 'a.json', tmp_path / 'o')
    with pytest.raises(BadInput, match='cannot be read'):
        run(tmp_path / 'none.json', tmp_path / 'o')


@pytest.mark.parametrize(('option', 'value'), [('--workers', '0'), ('--retries', '-1'), ('--workers', 'x')])
def test_numbers_that_are_refused(tmp_path, option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / 'a.json', tmp_path / 'o', f'{option}={value}')
    assert stopped.value.code == 2 and 'expected a whole number' in capsys.readouterr().err


def test_the_real_annotations(taco, tmp_path):
    data = taco_module.read_annotations(taco)
    records = taco_module.read_records(taco, data, tmp_path)
    table = taco_module.read_class_ids(taco_module.TABLE)
    (tmp_path / 'train_all.json').write_text(json.dumps(taco_module.convert(taco, data, table)))
    coco = read_coco(tmp_path, 'train', HOME)
    masks = [draw_mask(photo) for photo in coco.photos[::5]]
    assert len(records) == len(coco.photos) == 1500 and {mask.shape for mask in masks} == {(512, 512)}
    annotations = [one for photo in coco.photos for one in photo.annotations]
    assert len(annotations) == 4784 and len(table) == 60
    assert {one.category_id for one in annotations} == set(range(1, len(CLASSES)))
