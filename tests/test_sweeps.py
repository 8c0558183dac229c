"""docs/sweeps.md: the search of settings runs as it stands, goes on where it was stopped, and is short."""

from pathlib import Path

import pytest
from test_docs import blocks_of

import train
from config import load_config

PAGE = Path(__file__).resolve().parents[1] / 'docs/sweeps.md'
((_, CODE),) = (block for block in blocks_of(PAGE) if block[0] == 'python')


def test_the_search_is_short():
    compile(CODE, 'sweep.py', 'exec')
    assert len([line for line in CODE.splitlines() if line]) <= 36 and 'sqlite:///output/sweep.db' in CODE


def test_the_search_runs_and_goes_on(tiny, tiny_yaml, tmp_path, monkeypatch):
    optuna = pytest.importorskip('optuna')
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    (tmp_path / 'output').mkdir()
    monkeypatch.chdir(tmp_path)
    code = CODE.replace('configs/trash481.yaml', str(tiny_yaml)).replace('epochs=20', 'epochs=1')

    def sweep(trials: int) -> 'optuna.Study':
        names = {'__name__': '__main__'}
        exec(code.replace('], 30', f'], {trials}'), names)
        return names['study']

    started, main = [], train.main

    def stop_at_the_second_fold(cfg, fold, **options):
        started.append((cfg.name, fold))
        if len(started) == 2:
            raise KeyboardInterrupt
        return main(cfg, fold, **options)

    monkeypatch.setattr(train, 'main', stop_at_the_second_fold)
    with pytest.raises(KeyboardInterrupt):
        sweep(1)
    study = sweep(1)
    assert started[0] == started[2] and started[1] == started[3], 'the same trial, from its first fold on'
    (done,) = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    assert study.best_params == done.params and (tmp_path / 'output/sweep.db').is_file()
    folder = load_config(tiny_yaml).output_dir / started[0][0]
    assert (folder / 'oof.csv').is_file() and 0 <= done.value <= 1
