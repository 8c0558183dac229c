"""tools.compare and scripts/compare.sh: what is refused, which runs there are, and a stop in the middle."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import TINY, write_set

import evaluate
from tools import compare
from utils.errors import BadInput, Interrupted

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def steps(monkeypatch) -> list[list[str]]:
    """The scripts that would run, with their words."""
    words = []
    monkeypatch.setattr(compare.Runner, 'step', lambda self, step, env=None: words.append(step))
    monkeypatch.setattr(evaluate, 'command', lambda argv: words.append(['evaluate.py', *argv]))
    return words


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['nosuch'], 'nosuch: no such file'),
        (['demo', 'epohs=3'], "unknown key 'epohs'; did you mean 'epochs'?"),
        (['demo', 'lr'], 'expected key=value'),
        (['demo', 'lr=2.5e-3'], 'lr=2.5e-3: is what configs/demo.yaml has'),
        (['demo', 'lr=1e-3', '--set', 'lr=1e-3'], 'lr=1e-3: is what'),
        (['demo', 'lr=1e-3', 'lr=1e-2'], 'lr is given twice'),
        (['demo', 'seed=1'], 'seed=1: --seeds gives the seeds'),
        (['demo', 'lr=1e-3', '--set', 'seed=1'], '--seeds gives the seeds'),
        (['demo', 'data_root=x'], 'data_root=x: both sides have the same data_root; give it after --set'),
        (['demo', 'pseudo_keep=0.5'], 'is for pseudo.py'),
        (['demo', 'lr=1e-3', '--seeds', '0', '1', '0'], '--seeds: 0 is given twice'),
        (['demo', 'lr=1e-3', '--folds', '0', '0'], '--folds: 0 is given twice'),
        (['demo', 'lr=1e-3', '--folds', '0', '2'], '--folds 2: found no such fold, expected 0 to 1'),
        (['demo', 'lr=1e-3', '--folds', '-1'], '--folds -1: found no such fold'),
        (['demo', 'lr=1e-3', '--folds', '0', 'all'], '--folds all: found no such fold'),
    ],
)
def test_bad_usage_is_refused_before_anything_runs(words, message, steps, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(BadInput) as caught:
        compare.command(words)
    assert message in str(caught.value) and steps == []


def test_a_folder_of_another_run_is_refused_before_anything_runs(steps, tmp_path, tiny_yaml):
    folder = tmp_path / 'output/tiny-lr-0.01-seed1/fold1'
    folder.mkdir(parents=True)
    (folder / 'config.yaml').write_text(f'{tiny_yaml.read_text()}\nlr: 0.5\n')
    with pytest.raises(BadInput, match='tiny-lr-0.01-seed1/fold1: holds another config'):
        compare.command([str(tiny_yaml), 'lr=0.01'])
    assert steps == []


def test_runs_of_both_sides_by_seed_and_fold(steps, tiny_yaml, tmp_path):
    compare.command([str(tiny_yaml), 'lr=0.01', '--seeds', '3', '4', '--set', 'epochs=2', 'workers=1'])
    assert steps[0][:2] == ['prepare.py', 'folds'] and not any(word.startswith('seed=') for word in steps[0])
    trained = [step for step in steps if step[0] == 'train.py']
    names = [f'name=tiny-epochs-2{change}-seed{seed}' for seed in (3, 4) for change in ('', '-lr-0.01')]
    assert sorted({word for step in trained for word in step if word.startswith('name=')}) == sorted(names)
    assert len(trained) == 8 and all('--resume' in step and 'epochs=2' in step for step in trained)
    assert [('lr=0.01' in step) == ('-lr-0.01' in ' '.join(step)) for step in trained] == [True] * 8
    predicted = [step for step in steps if step[0] == 'infer.py']
    assert len(predicted) == 8 and all(step[-1] == '--update' for step in predicted)
    runs = [str(tmp_path / 'output' / name.removeprefix('name=')) for name in names]
    assert steps[-1][:7] == ['evaluate.py', 'compare', *runs[1::2], '--against', *runs[::2]]
    assert steps[-1][7:10] == ['--folds', '0', '1']


def test_without_a_change_the_seeds_of_one_config(steps, tiny_yaml):
    compare.command([str(tiny_yaml), '--folds', '1'])
    assert [step[0] for step in steps].count('train.py') == 3
    assert steps[-1][:2] == ['evaluate.py', 'seeds'] and len(steps[-1][2 : steps[-1].index('--folds')]) == 3


def test_a_change_of_the_prediction_takes_the_checkpoints_of_the_config(steps, tiny_yaml, tmp_path):
    best = tmp_path / 'output/tiny-seed0/fold0/best.pt'
    best.parent.mkdir(parents=True)
    best.write_text('weights')
    best.with_name('last.pt').touch()
    for _ in range(2):
        compare.command([str(tiny_yaml), 'tta_flips=[h]', '--seeds', '0', '--folds', '0'])
    assert [step[0] for step in steps].count('train.py') == 2  # once a call, of the config itself
    (link,) = tmp_path.glob('output/tiny-tta_flips-h-*-seed0/fold0/best.pt')
    assert link.read_text() == 'weights' and not link.readlink().is_absolute()


def test_names_are_safe_and_of_one_change_each():
    name = compare.name_changes
    assert name('a', []) == 'a' and name('a', ['lr=1e-3', 'ema=0.99']) == 'a-lr-1e-3-ema-0.99'
    others = {
        name('a', [f'loss={text}']) for text in ('{ce: 1}', '{ce:1}', '[ce, 1]', '한국', 'x/../y', 'b' * 300)
    }
    assert len(others) == 6
    for other in others:
        compare.load_config(ROOT / 'configs/demo.yaml', [f'name={other}-seed0'])
        assert len(other) < 130


def test_a_step_that_fails_ends_the_others_and_its_status_counts(monkeypatch):
    runner = compare.Runner([], 1)
    for status, error in ((2, BadInput), (75, Interrupted)):
        with pytest.raises(error, match=f'ended with status {status}'):
            runner.step(['-c', f'import sys; sys.exit({status})'])
    monkeypatch.setattr(
        runner, 'run_pair', lambda seed, fold: runner.step(['-c', f'import sys; sys.exit({2 * seed})'])
    )
    runner.recipes = [compare.Recipe(ROOT / 'configs/demo.yaml', (), 'demo')]
    run, done = runner.step, []
    monkeypatch.setattr(runner, 'step', lambda words: done.append(words) or (words[0] == '-c' and run(words)))
    with pytest.raises(BadInput):
        runner.run([(1, 0), (0, 0), (0, 1)])
    with pytest.raises(Interrupted, match='type the same again'):
        run(['-c', ''])


@pytest.mark.slow
def test_stopped_and_gone_on_with(tmp_path):
    """The script itself: stopped by a signal, gone on with, and typed again when there is nothing to do."""
    data = write_set(tmp_path / 'data', test=1)
    config = tmp_path / 'tiny.yaml'
    config.write_text('\n'.join(f'{key}: {value}' for key, value in (TINY | {'epochs': 2}).items()))
    places = [f'data_root={data}', f'cache_dir={tmp_path / "cache"}', f'output_dir={tmp_path / "output"}']
    words = ['bash', str(ROOT / 'scripts/compare.sh'), str(config), 'lr=1e-3']
    words += ['--seeds', '0', '1', '--folds', '0', '--set', *places]
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    with subprocess.Popen(
        words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (tmp_path / 'output/tiny-lr-1e-3-seed0/fold0/metrics.csv').exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        error = process.communicate()[1]
    assert process.returncode == 75 and error.endswith('interrupted\n') and 'Traceback' not in error, error
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob('output/*/*/best.pt')}
    printed = []
    for jobs in ('2', '1'):
        done = subprocess.run([*words, '--jobs', jobs], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout[done.stdout.index(f'{tmp_path}/output/tiny-lr-1e-3-seed0: mIoU') :])
    first = tmp_path / 'output/tiny-seed0/fold0/best.pt'
    assert first.stat().st_mtime_ns == times[first]
    assert printed[0] == printed[1] and 'on 12 photos and 2 seeds' in printed[0]
    assert 'interval over photos and 2 seeds' in printed[0] and 'seeds show a difference of' in printed[0]
