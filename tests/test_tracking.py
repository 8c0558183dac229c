"""Curves, config and pictures in wandb and MLflow, without a network."""

import csv
import math

import numpy as np
import pytest
from processes import ended, start

import train
from engine.runs import append_metrics, best_score, read_metrics
from engine.tracking import PROJECT, EpochResult, Mlflow, require_tracker, score_of
from metrics import Metric
from utils.errors import BadInput, CheckFailed


@pytest.mark.parametrize(
    ('metric', 'columns', 'score'),
    [
        (Metric(), ['miou', 'iou_a', 'iou_b'], (5 / 8 + 1 / 4) / 2),
        (Metric('dice', (1,)), ['dice', 'dice_a', 'dice_b'], 0.4),
        (Metric('image_miou'), ['image_miou', 'image_iou_a', 'image_iou_b'], (0.625 + 0.625) / 2),
        (Metric('image_dice', (1,)), ['image_dice', 'image_dice_a', 'image_dice_b'], (0.4 + 1) / 2),
    ],
)
def test_the_competitions_metric_is_the_score_of_an_epoch(metric, columns, score, tmp_path):
    counts = np.array([[[1, 1], [1, 2], [2, 3]], [[3, 0], [4, 0], [5, 0]]])
    counts[0, :, 0], counts[1, :, 0] = (2, 2, 4), (3, 4, 3)  # IoU 0.5 and 0.75, together 5 of 8
    result = EpochResult(0, 3, 1e-4, 2.5, counts, metric)
    assert result.score == score_of(counts, metric) == pytest.approx(score)
    values = result.values(('a', 'b'))
    name, *classes = columns
    assert [*values][4:] == [name, f'{name}_low', f'{name}_high', *classes]
    assert values[name] == result.score and values[f'{name}_low'] <= values[name] <= values[f'{name}_high']
    path = tmp_path / 'metrics.csv'
    append_metrics(path, values)
    append_metrics(path, {**values, 'epoch': 1, name: ''})
    first, second = read_metrics(path, name)
    assert first == {'epoch': 0, 'loss': 2.5, 'score': result.score} and math.isnan(second['score'])
    assert best_score([first, second]) == result.score
    other = 'dice' if name == 'miou' else 'miou'
    with pytest.raises(BadInput, match=f'expected a row an epoch with epoch, loss, {other}'):
        read_metrics(path, other)
    nothing = EpochResult(0, 3, 1e-4, 2.5, None, metric)
    assert math.isnan(nothing.score) and [*nothing.values(('a', 'b'))][4:] == [
        name,
        f'{name}_low',
        f'{name}_high',
    ]


def test_a_missing_package_is_one_line_before_training(tiny, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'wandb', None)  # as if it were not installed
    cfg = tiny.model_copy(update={'tracker': 'wandb'})
    with pytest.raises(BadInput, match="key 'tracker': wandb is not installed.*pip install wandb"):
        train.main(cfg, 0)
    assert not cfg.run_dir(0).exists()
    require_tracker(tiny)


def run_and_resume(tiny, tracker):
    """One epoch of a run, and its second after a resume."""
    cfg = tiny.model_copy(update={'tracker': tracker, 'epochs': 2, 'checkpoint_minutes': 0})

    def save_and_stop(self, *scores):
        end_epoch(self, *scores)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        end_epoch = train.Trainer.end_epoch
        patch.setattr(train.Trainer, 'end_epoch', save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train.main(cfg, 0)
    train.main(cfg, 0, resume=True)
    rows = list(csv.DictReader((cfg.run_dir(0) / 'metrics.csv').read_text().splitlines()))
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert list((cfg.run_dir(0) / 'tensorboard').iterdir())
    return cfg, rows


def test_wandb(tiny, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    cfg, _ = run_and_resume(tiny, 'wandb')
    runs = sorted((cfg.run_dir(0) / 'wandb').glob('offline-run-*'))
    (name,) = {file.name for run in runs for file in run.glob('run-*.wandb')}
    assert len(runs) == 2, 'each start is a part, and both are of one run'
    assert name.removeprefix('run-').removesuffix('.wandb') in (cfg.run_dir(0) / 'tracker.yaml').read_text()
    for run in runs:
        assert list(run.glob('files/media/images/predictions_*.png'))


def test_mlflow(tiny, monkeypatch):
    mlflow = pytest.importorskip('mlflow')
    pytest.importorskip('sqlalchemy')
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    cfg, rows = run_and_resume(tiny, 'mlflow')
    client = mlflow.MlflowClient(f'sqlite:///{cfg.output_dir.resolve() / "mlflow.db"}')
    (experiment,) = (found for found in client.search_experiments() if found.name == 'trash-segmentation')
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == 'FINISHED' and run.data.params['encoder'] == cfg.encoder
    curve = client.get_metric_history(run.info.run_id, 'loss')
    assert [f'{point.value:.6f}' for point in curve] == [row['loss'] for row in rows]
    names = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert 'config.yaml' in names and len(client.list_artifacts(run.info.run_id, 'images')) >= 2


def test_a_run_whose_first_batch_is_refused_has_failed(tiny, monkeypatch):
    mlflow = pytest.importorskip('mlflow')
    pytest.importorskip('sqlalchemy')
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)

    def refuse(*args):
        raise CheckFailed('first batch: all ignored')

    monkeypatch.setattr(train, 'check_first_batch', refuse)
    with pytest.raises(CheckFailed):
        train.main(tiny.model_copy(update={'tracker': 'mlflow'}), 0)
    client = mlflow.MlflowClient(f'sqlite:///{tiny.output_dir.resolve() / "mlflow.db"}')
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    assert [run.info.status for run in client.search_runs(ids)] == ['FAILED']


def test_a_run_that_starts_again_is_not_tracked_as_the_one_before(tiny):
    tiny.run_dir(0).mkdir(parents=True)
    path = tiny.run_dir(0) / 'tracker.yaml'
    path.write_text('wandb: abc\n')
    train.main(tiny, 0, overwrite=True)
    assert not path.exists()


def test_folds_that_start_at_once_share_one_experiment(tiny):
    mlflow = pytest.importorskip('mlflow')
    cfg = tiny.model_copy(update={'tracker': 'mlflow'})
    processes = [start(Mlflow, cfg, fold, None)[0] for fold in range(4)]
    assert ended(processes) == [0] * 4
    client = mlflow.MlflowClient(f'sqlite:///{cfg.output_dir.resolve() / "mlflow.db"}')
    experiment = client.get_experiment_by_name(PROJECT)
    assert len(client.search_runs([experiment.experiment_id])) == 4
