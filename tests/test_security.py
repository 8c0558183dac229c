"""Hostile input does no harm: files that would run code, lie about their sizes, or lead out of the data root;
calls that no source may make; requests to the app.
"""

import ast
import io
import json
import pickle
import struct
import tarfile
import time
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import entry_points
import numpy as np
import pytest
import torch
from conftest import write_set
from PIL import Image

from config import HOME, load_config
from data.coco import read_coco, read_photo
from data.photos import read_rgb
from engine.checkpoint import load_checkpoint
from utils.errors import BadInput
from utils.files import map_array
from utils.id_csv import HEADER, read_masks
from utils.id_text import SIDE
from utils.safe_load import LEGACY, read_tensors

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / name for name in entry_points.MODULES]
TERA = 10**12


@contextmanager
def refused(path: Path, message: str = ''):
    """Expect BadInput on one line that names the file, within 5 s of CPU time and 200 MB more of memory."""
    Path('/proc/self/clear_refs').write_text('5')  # the peak begins here
    before, started = memory(), time.process_time()
    with pytest.raises(BadInput, match=message) as error:
        yield
    assert str(path) in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 600
    assert time.process_time() - started < 5 and memory() - before < 200 * 2**20


def memory() -> int:
    """Return the peak memory of this process in bytes."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith('VmHWM')).split()[1])


# --- what the sources call ---------------------------------------------------------------------------------

FORBIDDEN = {
    'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'pickle.load', 'pickle.loads',
    'pickle.Unpickler', 'marshal.loads', 'marshal.load', 'shelve.open', 'joblib.load', 'pd.read_pickle',
    'torch.hub.load', 'yaml.unsafe_load', 'yaml.full_load', 'yaml.load_all',
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    """Return the name that is called, such as 'torch.load'."""
    if isinstance(node, ast.Attribute):
        return f'{dotted(node.value)}.{node.attr}'
    return node.id if isinstance(node, ast.Name) else ''


def faults_of(source: str) -> list[str]:
    """List the calls that would run what is in a file."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if (
            name in FORBIDDEN
            or (name == 'torch.load' and words.get('weights_only') != 'True')
            or words.get('allow_pickle', 'False') != 'False'
            or (name == 'yaml.load' and words.get('Loader') != 'StrictLoader')
            or words.get('shell', 'False') != 'False'
            or words.get('trust_remote_code', 'False') != 'False'
        ):
            faults.append(f'line {node.lineno}: {name}')
    return faults


def test_sources_run_nothing_that_is_in_a_file():
    assert len(SOURCES) > 40
    assert {str(path): faults for path in SOURCES if (faults := faults_of(path.read_text()))} == {}
    loads = [path.name for path in SOURCES if 'torch.load(' in path.read_text()]
    assert loads == ['safe_load.py'], 'files of tensors are read by read_tensors alone'


@pytest.mark.parametrize(
    'source',
    ['pickle.load(f)', 'torch.load(f)', 'np.load(f, allow_pickle=True)', 'yaml.load(f, Loader=yaml.Loader)',
     'eval(s)', 'subprocess.run(s, shell=True)', 'torch.load(f, weights_only=False)'],
)  # fmt: skip
def test_a_call_that_runs_a_file_is_seen(source):
    assert len(faults_of(source)) == 1


# --- checkpoints -------------------------------------------------------------------------------------------


def saved(**options) -> bytes:
    file = io.BytesIO()
    torch.save({'w': torch.arange(10.0)}, file, **options)
    return file.getvalue()


def packed(pickled: bytes) -> bytes:
    """Return a file of torch.save with another pickle in it."""
    return rezipped({'archive/data.pkl': pickled})


def rezipped(changes: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved())) as good, zipfile.ZipFile(out, 'w', compression) as archive:
        for name in good.namelist():
            archive.writestr(name, (changes or {}).get(name) or good.read(name))
    return out.getvalue()


def other_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        archive.writestr('photos/a.txt', 'no tensor')
    return out.getvalue()


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as archive:
        for name in ('storages', 'tensors', 'pickle'):
            entry = tarfile.TarInfo(name)
            entry.size = 1 << 20
            archive.addfile(entry, io.BytesIO(bytes(1 << 20)))
    return out.getvalue()


class Code:
    def __reduce__(self):
        return print, ('code in a checkpoint ran',)


SAFETENSORS = json.dumps({'w': {'dtype': 'F32', 'shape': [TERA], 'data_offsets': [0, 4 * TERA]}}).encode()
CHECKPOINTS = {
    'code': lambda: packed(pickle.dumps({'model': Code()}, protocol=2)),
    'code alone': lambda: pickle.dumps(Code()),
    'code in the old format': lambda: (
        saved(_use_new_zipfile_serialization=False)[: len(LEGACY)] + pickle.dumps(Code(), protocol=2)
    ),
    'text that is decoded': lambda: packed(b'\x80\x02c_codecs\nencode\nX\1\0\0\0aX\3\0\0\0hex\x86R.'),
    'a compressed zip': lambda: rezipped(compression=zipfile.ZIP_DEFLATED),
    'another zip': other_zip,
    'a tar': tar,
    'nothing': lambda: b'',
    'garbage': lambda: np.random.default_rng(0).bytes(1000),
    'text': lambda: b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n',
    'its first half': lambda: saved()[: len(saved()) // 2],
    'a beginning in the old format': lambda: saved(_use_new_zipfile_serialization=False)[:300],
    'all but the last byte': lambda: saved()[:-1],
}


@pytest.mark.parametrize('fault', CHECKPOINTS)
def test_hostile_checkpoint(tmp_path, fault, capfd):
    path = tmp_path / 'best.pt'
    path.write_bytes(CHECKPOINTS[fault]())
    with refused(path, 'no file of tensors'):
        load_checkpoint(path)
    assert 'ran' not in capfd.readouterr().out


def test_safetensors_that_lie(tmp_path):
    path = tmp_path / 'w.safetensors'
    for content in (struct.pack('<Q', len(SAFETENSORS)) + SAFETENSORS, struct.pack('<Q', TERA), b''):
        path.write_bytes(content)
        with refused(path, 'no file of tensors'):
            read_tensors(path)


def test_what_is_not_a_checkpoint_of_train(tmp_path):
    path = tmp_path / 'best.pt'
    good = {'model': {}, 'config': {}, 'fold': 0, 'held_out': None, 'epoch': 0, 'score': 0.5}
    torch.save(good, path)
    assert load_checkpoint(path) == good
    for change, message in [
        ({'fold': 'x'}, 'fold is of type str'),
        ({'model': {'w': 3}}, "model holds 'w', no tensor"),
        ({'score': torch.zeros(3)}, 'score is of type Tensor'),
    ]:
        torch.save({**good, **change}, path)
        with refused(path, message):
            load_checkpoint(path)


def test_torch_that_is_not_safe_is_refused(tmp_path, monkeypatch):
    path = tmp_path / 'best.pt'
    path.write_bytes(saved())
    monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion('2.5.1'))
    with pytest.raises(BadInput, match=r'torch 2\.5\.1: loading with it may run code'):
        read_tensors(path)


def test_arrays_that_lie(tmp_path):
    path = tmp_path / 'masks.npy'
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }"
    for size, message in ((10**15, 'not an array'), (10**30, 'not an array'), (5, r'found \(5,\)')):
        text = (header % size).ljust(117).encode() + b'\n'
        path.write_bytes(b'\x93NUMPY\1\0' + struct.pack('<H', len(text)) + text + bytes(5))
        with refused(path, message):
            map_array(path, (7,))
    np.save(path, np.array([Code()]), allow_pickle=True)
    with refused(path, 'not an array'):
        map_array(path, (1,))
    path.write_bytes(b'')
    with refused(path, 'not an array'):
        map_array(path, (1,))
    np.save(path, np.arange(7, dtype=np.uint8))
    assert map_array(path, (7,))[6] == 6


# --- annotations and photos --------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> Path:
    return write_set(tmp_path / 'd', train=2, test=1, side=64)


def change(data: Path, key: str, **values) -> Path:
    """Change the first record of a list in train_all.json, and return that file."""
    path = data / 'train_all.json'
    content = json.loads(path.read_text())
    content[key][0].update(values)
    path.write_text(json.dumps(content))
    return path


ZIGZAG = [20_000 * (n // 2 % 2) if n % 2 else n / 100 for n in range(200_000)]


@pytest.mark.parametrize(
    ('key', 'values', 'message'),
    [
        ('annotations', {'segmentation': {'size': [64, 64], 'counts': [TERA]}}, 'add up to 1000000000000'),
        ('annotations', {'segmentation': {'size': [10**6, 10**6], 'counts': [TERA]}}, 'RLE size'),
        ('annotations', {'iscrowd': 10**400}, "iscrowd is '1000"),
        ('annotations', {'category_id': 10**400}, 'category_id 1000'),
        ('annotations', {'segmentation': [[10**400] * 6]}, 'has the coordinate 1000'),
        ('annotations', {'id': 'x\n' + 'x' * 10**6, 'iscrowd': 5}, r"annotation 'x\\nx{10,80}: iscrowd is"),
        ('annotations', {'image_id': 'x' * 10**6}, "image_id 'x{10,80} is not among"),
        ('images', {'height': 10**400}, 'height is 1000'),
        ('images', {'height': 20_000, 'width': 20_000}, 'has 400,000,000 pixels'),
        ('images', {'file_name': 'a' * 300}, 'is not a file name'),
        ('images', {'file_name': '\ud800.jpg'}, 'is not a file name'),
        ('images', {'file_name': 'a\n.jpg'}, 'is not a file name'),
    ],
)
def test_hostile_annotation(data, key, values, message):
    path = change(data, key, **values)
    with refused(path, message):
        read_coco(data, 'train', HOME)


def test_polygon_that_would_be_drawn_for_hours(data):
    """pycocotools would need 40 GB for 200,000 coordinates, each 20,000 pixels from the last."""
    change(data, 'images', height=5_000, width=20_000)
    path = change(data, 'annotations', image_id=0, segmentation=[[x / 4 for x in ZIGZAG]])
    with refused(path, 'pixels long, expected at most 1,000,000'):
        read_coco(data, 'train', HOME)


def test_nothing_leads_out_of_the_root(data, tmp_path):
    outside = tmp_path / 'outside'
    outside.mkdir()
    (outside / 'a.jpg').write_bytes((data / 'batch_01/0000.jpg').read_bytes())
    (data / 'link').symlink_to(outside)
    (data / 'circle').symlink_to(data / 'circle')
    inner = data / 'inner'
    inner.symlink_to(data / 'batch_01')
    linked = ('link/a.jpg', 'circle/a.jpg')
    for name in (*linked, '../outside/a.jpg', 'batch_01/../../outside/a.jpg', str(outside / 'a.jpg')):
        path = change(data, 'images', file_name=name)
        with refused(path, 'leads out of'):
            read_coco(data, 'train', HOME)
    change(data, 'images', file_name='inner/0000.jpg')
    assert read_coco(data, 'train', HOME).photos[0].file_name == 'inner/0000.jpg'


def png(height: int, width: int, rows: int) -> bytes:
    """Return a PNG whose header says height x width, with so many black rows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack('>I', zlib.crc32(kind + content))
        return struct.pack('>I', len(content)) + kind + content + checksum

    packer = zlib.compressobj(1)
    parts = [packer.compress(bytes(1 + 3 * width)) for _ in range(rows)] + [packer.flush()]
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b'IHDR', header), chunk(b'IDAT', b''.join(parts)), chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


def test_photos_that_are_bombs(data, tmp_path):
    path = tmp_path / 'photo.png'
    path.write_bytes(png(30_000, 30_000, 200))
    assert path.stat().st_size < 100_000
    with refused(path, 'found far too many pixels, expected at most'):
        read_rgb(path)
    path.write_bytes(png(2, 30_000, 2))
    with refused(path, 'found 2x30000 pixels, expected at most 20,000 a side'):
        read_rgb(path)
    coco = read_coco(data, 'train', HOME)
    path = coco.path(coco.photos[0])
    path.write_bytes(png(3_000, 3_000, 3_000))  # its record says 64 x 64
    with refused(path, 'found 3000x3000 pixels, its record says 64x64'):
        read_photo(coco, coco.photos[0])


def test_formats_whose_readers_start_programs(tmp_path):
    path = tmp_path / 'photo.jpg'
    Image.new('RGB', (64, 64)).save(path, format='EPS')
    with refused(path, 'cannot be decoded'):
        read_rgb(path)


def test_devices_are_not_read():
    for read in (load_config, read_rgb, read_tensors):
        with refused(Path('/dev/zero'), 'is not a file'):
            read(Path('/dev/zero'))


def test_annotations_of_test_json_that_are_no_list(data):
    path = data / 'test.json'
    for value in (5, {}, 'x'):
        path.write_text(json.dumps({**json.loads(path.read_text()), 'annotations': value}))
        with refused(path, 'annotations is .* expected list'):
            read_coco(data, 'test', HOME)


def test_image_ids_that_no_line_can_hold(tmp_path):
    path = tmp_path / 'a.csv'
    row = b',' + b'0 ' * (SIDE * SIDE - 1) + b'0\n'
    for image_id, message in (
        (b'x' * 131_000, 'has 131,000 characters'),
        (b'a\tb', 'a control character'),
    ):
        path.write_bytes(HEADER + image_id + row)
        with refused(path, message):
            read_masks(path)


# --- the config --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('lr: ' + '9' * 10_000, 'not YAML|lr'),
        ('lr: 2001-99-99', 'not YAML'),
        ('lr: !!int x', 'not YAML'),
        ('lr: !!timestamp x', 'not YAML'),
        ('lr: !!bool x', 'not YAML'),
        ('lr: !!python/object/apply:os.system [id]', 'not YAML'),
        ('? [a]\n: b', 'not YAML'),
        ('name: ' + 'a' * 300, 'name'),
        ('encoder: "a\\0b"', 'encoder: found'),
        ('data_root: "\\ud800"', 'data_root: found|not YAML'),
        ('seed: 4294967296', "key 'seed'"),
        ('epochs: ' + '1' * 4000, "key 'epochs'"),
        ('tta_scales: [1e300]', "key 'tta_scales"),
        ('\n'.join(f'k{n}: 1' for n in range(8_000)), 'unknown key'),
    ],
)
def test_hostile_config(tmp_path, text, message):
    path = tmp_path / 'c.yaml'
    path.write_bytes(text.encode(errors='surrogatepass'))
    with refused(path, message):
        load_config(path)


def test_hostile_override(tiny_yaml):
    with pytest.raises(BadInput, match='expected key=value') as error:
        load_config(tiny_yaml, ['x' * 10_000])
    assert len(str(error.value)) < 200
    for text in ('lr=2001-99-99', 'lr=!!bool x', 'lr={lr: 1, lr: 2}'):
        with pytest.raises(BadInput, match='not YAML') as error:
            load_config(tiny_yaml, [text])
        assert len(str(error.value)) < 500
