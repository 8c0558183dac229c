"""Which epoch becomes best.pt, how often there is a validation, and what choosing an epoch gains."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_steps import compare, elsewhere, make_trainer, resumed, stopping, train_on

import evaluate
import infer
import train
from config import Config, dump_config
from engine.checkpoint import load_checkpoint
from engine.runs import choose_epochs, open_run, read_fold
from engine.trainer import Trainer
from utils.errors import BadInput, Interrupted

SCORES = (0.3, 0.1, 0.2)


def test_the_last_epoch_is_kept_once_at_the_end(tiny):
    """A run that was stopped has no best.pt that would seem to be finished, and goes on to the bit."""
    cfg = tiny.model_copy(update={'epochs': 3, 'ema': 0.9, 'keep': 'last', 'checkpoint_minutes': 0})
    whole, best = make_trainer(cfg), cfg.run_dir(0) / 'best.pt'
    train_on(whole, SCORES)
    kept = load_checkpoint(best)
    assert (kept['epoch'], kept['score'], whole.best, whole.best_epoch) == (2, 0.2, 0.2, 2)
    assert all(torch.equal(kept['model'][key], v) for key, v in whole.ema.module.state_dict().items())
    other = elsewhere(cfg)
    open_run(other, 0, overwrite=False)
    with pytest.raises(Interrupted):
        train_on(stopping(make_trainer(other), 7), SCORES)  # in the last epoch
    with pytest.raises(BadInput, match='but a last.pt; go on with train.py --resume'):
        infer.main(other, 0, 'oof')
    train_on(resumed(other), SCORES)
    compare(cfg, other)
    train_on(resumed(other), SCORES)  # nothing is left to do
    compare(cfg, other)


def test_the_average_of_the_last_epochs_is_kept_whatever_it_scores(tiny):
    for keep, epoch_score in (('best', 0.3), ('last', 0.1)):
        trainer = make_trainer(tiny.model_copy(update={'swa': 1.0, 'keep': keep, 'name': keep}))
        with trainer.bar() as bar, trainer.writer:
            trainer.train_epoch(0, bar)
            average = trainer.finish_swa().state_dict()
            trainer.end_epoch(0.3, 0.1)
        kept = load_checkpoint(trainer.folder / 'best.pt')
        assert kept['score'] == trainer.best == epoch_score
        has_average = all(torch.equal(kept['model'][key], value) for key, value in average.items())
        assert has_average == (keep == 'last')


def test_an_earlier_best_pt_goes_when_the_last_epoch_is_to_be_kept(tiny):
    """Without a last.pt it is of a training that ended before its first one; with one it is this run's."""
    folder = tiny.run_dir(0)
    folder.mkdir(parents=True)
    for keep, files, remains in (('best', [], True), ('last', ['last.pt'], True), ('last', [], False)):
        for name in ['best.pt', *files]:
            (folder / name).write_text('')
        open_run(tiny.model_copy(update={'keep': keep}), 0, overwrite=False)
        assert (folder / 'best.pt').exists() == remains
        (folder / 'last.pt').unlink(missing_ok=True)


def test_an_epoch_without_validation_is_not_the_best(tiny):
    trainer = make_trainer(tiny.model_copy(update={'epochs': 4, 'val_interval': 2}))
    train_on(trainer, (None, 0.3, None, 0.2))
    assert (trainer.best, trainer.best_epoch) == (0.3, 1)


def test_validation_every_second_epoch(tiny, capsys, monkeypatch):
    scores, end_epoch = [], Trainer.end_epoch
    monkeypatch.setattr(
        Trainer, 'end_epoch', lambda self, *args: [scores.append(args[0]), end_epoch(self, *args)]
    )
    cfg = tiny.model_copy(update={'epochs': 3, 'val_interval': 2})
    best = train.main(cfg, 0)
    assert scores[0] is None and max(scores[1:]) == best
    with (cfg.run_dir(0) / 'metrics.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['miou'] != '' for row in rows] == [False, True, True]
    assert rows[0].keys() == rows[1].keys() and rows[1]['iou_Paper'] != ''
    kept = load_checkpoint(cfg.run_dir(0) / 'best.pt')
    assert kept['score'] == best == pytest.approx(max(float(row['miou']) for row in rows[1:]), abs=1e-6)
    assert kept['epoch'] in (1, 2)
    infer.main(cfg, 0, 'oof', tta=False)
    assert 'on 12 photos, on which the epoch was chosen (keep: best)' in capsys.readouterr().out


def test_the_last_epoch_is_no_choice(tiny, capsys):
    cfg = tiny.model_copy(update={'epochs': 2, 'keep': 'last', 'val_interval': 9})
    score = train.main(cfg, 0)
    assert f'last mIoU {score:.4f} in epoch 2; wrote' in capsys.readouterr().out
    assert infer.main(cfg, 0, 'oof', tta=False) == score
    printed = capsys.readouterr().out
    assert 'bootstrap interval on 12 photos' in printed and 'chosen' not in printed
    assert math.isnan(train.main(cfg, -1)) and load_checkpoint(cfg.run_dir(-1) / 'best.pt')['epoch'] == 1


def write_curves(run: Path, curves: list[list[float]], **keys) -> Path:
    """Write the config.yaml and metrics.csv of folds with these validation scores."""
    for fold, scores in enumerate(curves):
        folder = run / f'fold{fold}'
        folder.mkdir(parents=True, exist_ok=True)
        cfg = Config(name=run.name, **({'epochs': len(scores)} | keys))
        (folder / 'config.yaml').write_text(dump_config(cfg))
        rows = [f'{epoch},1,{"" if math.isnan(s) else s}' for epoch, s in enumerate(scores)]
        (folder / 'metrics.csv').write_text('\n'.join(['epoch,loss,miou', *rows]))
    return run


def test_epochs_that_folds_choose_for_each_other(tmp_path, capsys):
    nan = math.nan
    curves = [[nan, 0.2, nan, 0.5, nan, 0.4], [nan, 0.3, nan, 0.4, nan, 0.7], [nan, 0.6, nan, 0.5, nan, 0.5]]
    run = write_curves(tmp_path / 'run', curves, val_interval=2)
    evaluate.command(['epochs', str(run)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ' '.join(lines[1]) == 'fold 0 0.5000 in 4 0.4000 in 6 0.4000 in 6'
    assert ' '.join(lines[2]) == 'fold 1 0.7000 in 6 0.4000 in 4 0.7000 in 6'
    assert ' '.join(lines[3]) == 'fold 2 0.6000 in 2 0.5000 in 6 0.5000 in 6'
    assert ' '.join(lines[4]) == 'mean 0.6000 0.4333 0.5333'
    assert lines[5][-1] == '+0.1667' and lines[6][-1] == '+0.1000'


def test_the_optimism_of_flat_curves_is_that_of_their_noise():
    """The highest of 20 values of a normal distribution is 1.87 deviations above the mean."""
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(300):
        curves = rng.normal(0.7, 0.01, (5, 20))
        scores = np.take_along_axis(curves, choose_epochs(curves).T, axis=1).mean(0)
        gains.append(scores - 0.7)
    best, by_others, last = np.mean(gains, axis=0)
    assert best == pytest.approx(0.0187, abs=0.001) and max(abs(by_others), abs(last)) < 0.001


@pytest.mark.parametrize(
    ('curves', 'keys', 'message'),
    [
        ([[0.1, 0.2]], {}, 'found 1 fold with a metrics.csv, expected two or more'),
        ([[0.1, 0.2], [0.1]], {'epochs': 2}, 'fold1: has 1 of 2 epochs; go on with --resume'),
        ([[0.1, 0.2], [0.1]], {}, 'fold1: is of 1 epochs, .*fold0 of 2; train all folds for as many'),
        ([[0.1, 0.2], [0.1, math.nan]], {}, 'a fold has no validation score of the last epoch'),
    ],
)
def test_folds_whose_epochs_cannot_be_compared(tmp_path, curves, keys, message):
    with pytest.raises(BadInput, match=message):
        evaluate.command(['epochs', str(write_curves(tmp_path / 'run', curves, **keys))])


def test_the_score_of_the_epoch_that_is_kept(tmp_path):
    for keys, score in (({}, 0.5), ({'keep': 'last'}, 0.3)):
        run = write_curves(tmp_path / 'run', [[0.2, 0.5, 0.3]], **keys)
        assert read_fold(run / 'fold0').score == score
    run = write_curves(tmp_path / 'run', [[0.2, 0.5, 0.3]], keep='last', epochs=4)
    assert math.isnan(read_fold(run / 'fold0').score)
