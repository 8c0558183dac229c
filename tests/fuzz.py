"""Throw bytes at the readers: they may raise BadInput alone, and what they accept is read again the same.

    python tests/fuzz.py csv --seconds 60     # coverage-guided (atheris); or coco, config, checkpoint, all

A target writes its bytes to a file and reads it. atheris leaves an input that breaks a target in CRASHES.
"""

import argparse
import atexit
import io
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CRASHES = ROOT / 'output' / 'fuzz'
SHM = '/dev/shm' if Path('/dev/shm').is_dir() else None
# a folder that stays for atheris: libFuzzer ends the process before anything could be removed
WORK = CRASHES / 'work' if __name__ == '__main__' else Path(tempfile.mkdtemp(prefix='fuzz-', dir=SHM))
WORK.mkdir(parents=True, exist_ok=True)
atexit.register(shutil.rmtree, WORK, ignore_errors=True)
sys.path.insert(0, str(ROOT))


def imports() -> None:
    """Import the readers as globals of this file; atheris instruments what is imported inside its block."""
    global checkpoint, coco, config, errors, id_csv, safe_load, torch
    import torch

    import config
    from data import coco
    from engine import checkpoint
    from utils import errors, id_csv, safe_load


# --- targets -----------------------------------------------------------------------------------------------


def fuzz_csv(data: bytes) -> None:
    """Read rows, by both readers; '~' stands for 65,535 times '0 ', so that a whole row is within reach."""
    path = WORK / 'in.csv'
    path.write_bytes(data.replace(b'~', b'0 ' * 65_535))
    try:
        masks = id_csv.read_masks(path)
    except errors.BadInput as error:
        require_line(error)
        masks = None
    else:
        with id_csv.IdWriter(WORK / 'out.csv') as writer:
            for image_id, mask in masks.items():
                writer.write(image_id, mask)
        again = id_csv.read_masks(WORK / 'out.csv')
        assert list(again) == list(masks) and all((again[key] == masks[key]).all() for key in masks)
    try:
        with id_csv.IdReader(path) as reader:  # the same rules, in other code
            rows = {image_id: reader.read(image_id) for image_id in reader.image_ids}
    except errors.BadInput:
        rows = None
    assert (masks is None) == (rows is None), 'one reader took what the other refused'
    assert masks is None or all((rows[key] == masks[key]).all() for key in masks)


def fuzz_coco(data: bytes) -> None:
    root = WORK / 'coco'
    root.mkdir(exist_ok=True)
    for split in ('train', 'test'):
        name = 'train_all.json' if split == 'train' else 'test.json'
        (root / name).write_bytes(data)
        try:
            labels = coco.read_coco(root, split, config.Competition(classes=CLASSES))
        except errors.BadInput as error:
            require_line(error)
            continue
        for photo in labels.photos:
            if photo.height * photo.width < 1_000_000:
                assert coco.draw_mask(photo).shape == (photo.height, photo.width)
        (root / name).write_text(json.dumps(as_coco(labels.photos)))
        assert coco.read_coco(root, split, config.Competition(classes=CLASSES)).photos == labels.photos


def as_coco(photos) -> dict:
    """Return photos as the content of a file that they could be read from."""
    annotations = []
    for photo in photos:
        for a in photo.annotations:
            rle = {'size': [photo.height, photo.width], 'counts': a.rle.decode()}
            record = {'category_id': a.category_id, 'iscrowd': int(a.iscrowd), 'segmentation': rle}
            annotations.append({**record, 'image_id': photo.image_id, 'id': len(annotations)})
    images = [
        {'id': p.image_id, 'file_name': p.file_name, 'height': p.height, 'width': p.width} for p in photos
    ]
    categories = [{'id': k, 'name': name} for k, name in enumerate(CLASSES)]
    return {'images': images, 'categories': categories, 'annotations': annotations}


def fuzz_config(data: bytes) -> None:
    path = WORK / 'in.yaml'
    path.write_bytes(data)
    text = data.decode('latin-1')
    for overrides in ([], [f'lr={text}'], [text]):
        try:
            cfg = config.load_config(path if not overrides else GOOD_YAML, overrides)
        except errors.BadInput as error:
            require_line(error)
            continue
        again = WORK / 'again.yaml'
        again.write_text(config.dump_config(cfg), encoding='utf-8')
        assert config.load_config(again) == cfg


def fuzz_checkpoint(data: bytes) -> None:
    path = WORK / 'in.pt'
    path.write_bytes(data)
    for read in (safe_load.read_tensors, checkpoint.load_checkpoint):
        try:
            content = read(path)
        except errors.BadInput as error:
            require_line(error)
            continue
        if read is checkpoint.load_checkpoint:
            checkpoint.save_checkpoint(WORK / 'out.pt', content)
            assert same(checkpoint.load_checkpoint(WORK / 'out.pt'), content)


def saved(**options) -> bytes:
    """Return a small checkpoint."""
    out = io.BytesIO()
    model = {'w': torch.arange(6.0).view(2, 3), 'n': torch.tensor(3)}
    rest = {'config': {'lr': 1.0, 'a': [1, None]}, 'fold': 0, 'held_out': 'x', 'epoch': 1, 'score': 0.5}
    torch.save({'model': model, **rest}, out, **options)
    return out.getvalue()


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def require_line(error: Exception) -> None:
    """Assert that a message is short enough to read."""
    text = errors.one_line(error)
    assert len(text) < 4000, f'{len(text)} characters'


def fuzz_all(data: bytes) -> None:
    """Run one of the other targets, which the first byte chooses."""
    if data:
        list(TARGETS.values())[data[0] % 4](data[1:])


TARGETS = {
    'csv': fuzz_csv, 'coco': fuzz_coco, 'config': fuzz_config, 'checkpoint': fuzz_checkpoint, 'all': fuzz_all,
}  # fmt: skip
CLASSES = ('Background', 'A', 'B')
GOOD_YAML = WORK / 'good.yaml'
GOOD_YAML.write_text('lr: 1e-3\nclasses: [Background, A]\nscale_range: [0.5, 2]\nloss: {ce: 1, dice: 0.5}\n')


def seeds(name: str) -> list[bytes]:
    """Return good inputs, from which a fuzzer goes on."""
    if name == 'all':
        return [bytes([n]) + seed for n, target in enumerate(list(TARGETS)[:4]) for seed in seeds(target)]
    if name == 'csv':
        header = b'image_id,PredictionString\n'
        return [header + b'a.jpg,~0\n', header + b'a.jpg,~1\n"b,""c",~10\n', header + b'a.jpg,0 1 2\n']
    if name == 'coco':
        objects = [coco.Annotation(k, crowd, b'34i1', 4) for k, crowd in ((1, False), (2, True))]
        packed = as_coco([coco.Photo(1, 'a.jpg', 8, 8, tuple(objects)), coco.Photo(2, 'b/c.png', 8, 8)])
        good = json.loads(json.dumps(packed))
        good['annotations'][0]['segmentation'] = [[1.0, 1.0, 4.0, 1.0, 4.0, 4.0]]
        good['annotations'][1]['segmentation'] = {'size': [8, 8], 'counts': [3, 4, 57]}
        return [json.dumps(good).encode(), json.dumps(packed).encode()]
    if name == 'config':
        return [GOOD_YAML.read_bytes(), config.dump_config(config.Config(name='x')).encode(), b'1e-3']
    return [saved(), saved(_use_new_zipfile_serialization=False)]


WORDS = {
    'csv': [b'~', b' 10', b'\n', b'"', b'""', b',', b'image_id,PredictionString\n'],
    'coco': [
        b'"images"', b'"annotations"', b'"categories"', b'"id"', b'"file_name"', b'"height"', b'"width"',
        b'"segmentation"', b'"size"', b'"counts"', b'"area"', b'"iscrowd"', b'"image_id"', b'"category_id"',
        b'"name"', b'"A"', b'"../a"', b'"\\ud800"', b'1e999', b'NaN', b'null', b'true', b'[8, 8]',
    ],
    'config': [
        b'&a ', b'*a', b'!!int ', b'!!bool ', b'!!timestamp ', b'!!binary ', b'!!set ', b'<<: ', b'? ', b'|',
        b'2001-01-01', b'.inf', b'"\\0"', b'null', b'epochs: ', b'name: ', b'encoder: ', b'folds_csv: ',
        b'tta_flips: ', b'class_weights: ', b'amp: ', b'seed: ',
    ],
    'checkpoint': [
        b'ctorch\nFloatStorage\n', b'ctorch._utils\n_rebuild_tensor_v2\n', b'ccollections\nOrderedDict\n',
        b'ctorch\nSize\n', b'ctorch\ndevice\n', b'ctorch\nfloat32\n', b'ctorch._utils\n_rebuild_parameter\n',
        b'PK\1\2', b'PK\5\6', b'\x80\x02', b'\x8a\x08', b'q\0h\0',
    ],
}  # fmt: skip


def main(name: str, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(
        include=['data', 'engine', 'config', 'submission', 'utils', 'json', 'yaml', 'zipfile']
    ):
        imports()
    unpickler = torch._weights_only_unpickler.Unpickler
    unpickler.load = atheris.instrument_func(unpickler.load)
    corpus = CRASHES / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(seeds(name)):
        (corpus / f'seed{number}').write_bytes(content)
    words = WORDS[name] if name in WORDS else [word for words in WORDS.values() for word in words]
    escaped = (''.join(f'\\x{byte:02x}' for byte in word) for word in words)
    (WORK / 'words').write_text('\n'.join(f'"{word}"' for word in escaped))
    options = [
        f'-max_total_time={seconds}', '-timeout=20', '-rss_limit_mb=3000', '-max_len=8192',
        '-print_final_stats=1',
        f'-dict={WORK / "words"}', f'-artifact_prefix={CRASHES}/{name}-', '-verbosity=1',
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Throws bytes at a reader.')
    parser.add_argument('target', choices=list(TARGETS))
    parser.add_argument('--seconds', type=int, default=60)
    args = parser.parse_args()
    os.chdir(WORK)
    main(args.target, args.seconds)
else:
    imports()
