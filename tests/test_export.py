"""A model as an ONNX file: the masks of infer.py, in another runtime; and its card."""

import re
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from conftest import TINY

import infer
import train
from config import Config, dump_config, load_config
from data.cache import open_cache
from data.folds import read_folds, split_fold
from dataset import WholePhotos
from engine.runs import read_metrics
from models import SegModel
from tools import export_onnx
from tools.export_onnx import Export, MaskModel, compare_onnx, to_onnx
from utils.errors import BadInput, CheckFailed
from utils.id_csv import IdReader


@pytest.fixture(scope='module')
def trained(shapes, shared_cache, tmp_path_factory) -> Config:
    """A trained fold, with its predictions of one view out of fold."""
    folders = {
        'data_root': shapes,
        'cache_dir': shared_cache,
        'output_dir': tmp_path_factory.mktemp('export'),
    }
    more = {'head': 'knet', 'stages': 1, 'tta_flips': ['h'], 'infer_batch_size': 5}
    cfg = Config(**TINY | folders | more, name='run')
    train.main(cfg, 0)
    infer.main(cfg, 0, 'oof', tta=False)
    (cfg.output_dir / 'run.yaml').write_text(dump_config(cfg))
    return cfg


def export_fold(cfg: Config, fold: str = '0') -> None:
    export_onnx.command(['--cfg', str(cfg.output_dir / 'run.yaml'), '--fold', fold])


@pytest.fixture(scope='module')
def export(trained) -> Export:
    """What to_onnx made of the fold, which takes most of the seconds of an export."""
    exports = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_onnx, 'to_onnx', lambda *args: exports.append(to_onnx(*args)) or exports[0])
        export_fold(trained)
    return exports[0]


@pytest.fixture(scope='module')
def exported(trained, export) -> Path:
    """The folder with its model.onnx and model.md."""
    return trained.run_dir(0)


def test_onnx_gives_the_masks_of_infer_and_its_card_says_how(trained, exported, tmp_path, monkeypatch):
    session = onnxruntime.InferenceSession(exported / 'model.onnx')
    cache = open_cache(trained, 'train')
    _, rows = split_fold(read_folds(trained, cache), 0)
    photos = torch.stack([photo for photo, _ in WholePhotos(cache, rows, trained.image_size)]).numpy()
    masks, probs = session.run(None, {'photos': photos})  # all at once: no batch that it was made with
    with IdReader(exported / 'oof.csv', 11) as reader:
        expected = np.stack([reader.read(name) for name in cache.names(rows)])
    assert len(np.unique(expected)) > 1
    assert np.mean(masks == expected) > 0.999
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-5)

    card = (exported / 'model.md').read_text()
    best = max(row['score'] for row in read_metrics(exported / 'metrics.csv'))
    assert f'mIoU {best:.4f} on the photos of fold 0' in card and '| 10 | Clothing |' in card
    code = re.search(r'```python\n(.*?)```', card, re.DOTALL)[1]
    png = cv2.imencode('.png', photos[0].transpose(1, 2, 0)[..., ::-1])[1]  # nothing is lost
    (tmp_path / 'photo.jpg').write_bytes(png.tobytes())
    (tmp_path / 'model.onnx').symlink_to(exported / 'model.onnx')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert np.mean(names['masks'] == masks[:1]) > 0.999


def test_file_that_disagrees_is_not_written(trained, exported, export, monkeypatch):
    path = exported / 'model.onnx'

    def of_other_weights(model: MaskModel, photos: WholePhotos) -> Export:
        with torch.no_grad():
            for parameter in model.model.head.parameters():
                parameter.neg_()
        return export

    monkeypatch.setattr(export_onnx, 'to_onnx', of_other_weights)
    path.write_bytes(b'the one before')
    with pytest.raises(CheckFailed, match='not written: only .* between ONNX Runtime and torch'):
        export_fold(trained)
    assert path.read_bytes() == b'the one before'
    path.write_bytes(export.content)


def test_export_without_its_packages(trained, monkeypatch):
    monkeypatch.setattr(export_onnx, 'find_spec', lambda name: None)
    with pytest.raises(BadInput, match='pip install onnx onnxscript onnxruntime'):
        export_fold(trained)


def test_export_of_a_run_that_is_none(tiny_yaml):
    with pytest.raises(BadInput, match='no such checkpoint; train it first'):
        export_onnx.command(['--cfg', str(tiny_yaml), '--fold', '0'])


def test_export_of_a_fold_that_was_not_trained(trained):
    with pytest.raises(BadInput, match='best.pt: no such checkpoint'):
        export_fold(trained, '1')
    assert not trained.run_dir(1).exists()


def test_probabilities_are_of_a_split_alone(trained, capsys):
    with pytest.raises(SystemExit) as stop:
        infer.command(
            ['--cfg', str(trained.output_dir / 'run.yaml'), '--fold', '0', '--image', 'a.jpg', '--save-probs']
        )
    assert stop.value.code == 2 and '--save-probs goes with --split' in capsys.readouterr().err


def test_what_a_killed_export_left_is_removed(trained, exported, export, monkeypatch):
    monkeypatch.setattr(export_onnx, 'to_onnx', lambda *_: export)
    (exported / '.model.onnx.1.partial').write_bytes(b'half')
    export_fold(trained)
    assert not list(exported.glob('.*.partial')) and (exported / 'model.onnx').stat().st_size > 100


def test_a_new_training_has_no_export_of_the_old_one(trained, exported):
    train.main(trained, 0, overwrite=True)
    assert not (exported / 'model.onnx').exists() and not (exported / 'model.md').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'encoder', 'channels'),
    [
        ('convnext_knet', 'convnext_atto', 64),
        ('swin', 'swin_tiny_patch4_window7_224', 32),
        ('svt', 'twins_svt_small', 32),
        ('beit', 'beit_base_patch16_224', 32),
        ('mask2former_swin', 'swin_tiny_patch4_window7_224', 64),
        ('ocrnet_hrnet', 'hrnet_w18_small', 32),
        ('setr', 'vit_tiny_patch16_224', 32),
        ('unetpp_effb4', 'timm-efficientnet-b0', None),
    ],
)
def test_every_family_has_an_onnx_form(name, encoder, channels):
    changes = [f'encoder={encoder}', 'encoder_weights=none', 'image_size=256', 'crop_size=256', 'amp=off']
    changes += [f'head_channels={channels}'] if channels else []
    changes += ['features=[3,6,9,12]'] if name in ('beit', 'setr') else []
    cfg = load_config(f'configs/{name}.yaml', changes)
    model = MaskModel(SegModel(cfg, load_weights=False).eval(), cfg, ())
    export_onnx.unfuse(model)
    photos = [(torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8), row) for row in range(4)]
    agreement = compare_onnx(to_onnx(model, photos).content, model, photos, 3)
    assert agreement.same_class > 0.999
