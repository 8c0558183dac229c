"""The same seed gives the same folds, samples and weights; another seed others."""

import torch

import train
from data.cache import open_cache
from data.folds import folds_path, read_folds
from engine.checkpoint import load_checkpoint


def test_the_same_folds(tiny, tmp_path):
    runs = []
    for name, seed in (('one', 0), ('two', 0), ('three', 1)):
        cfg = tiny.model_copy(update={'cache_dir': tmp_path / name, 'seed': seed})
        read_folds(cfg, open_cache(cfg, 'train'))
        runs.append(folds_path(cfg).read_bytes())
    assert runs[0] == runs[1] != runs[2]


def test_the_same_weights_whatever_the_number_of_workers(tiny):
    """Weights, averages and scores to the bit; samples of each number of workers are in test_dataset.py."""
    runs = []
    for name, changes in {'a': {}, 'b': {'workers': 2}, 'c': {'seed': 1}}.items():
        augment = {'name': name, 'epochs': 2, 'ema': 0.9, 'shift_rotate': 0.5, 'copy_paste': 0.5}
        cfg = tiny.model_copy(update={**augment, **changes})
        score = train.main(cfg, 0)
        checkpoint = load_checkpoint(cfg.run_dir(0) / 'last.pt')
        runs.append((score, checkpoint['model'] | checkpoint['resume']['ema']))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][key]) for key, value in runs[0][1].items())
    assert not all(torch.equal(value, runs[2][1][key]) for key, value in runs[0][1].items())
