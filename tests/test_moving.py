"""output/ and the data root are moved, together or each alone, and every command goes on there."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import TINY

import ensemble
import evaluate
import infer
import pseudo
import train
import viz
from config import Config, dump_config, dump_run_config, load_config, make_config
from engine.runs import check_run, open_run, read_run_config
from tools import soup
from utils.errors import BadInput
from utils.paths import find_path, path_from
from utils.yaml_files import read_yaml


@pytest.fixture
def place(shapes, tmp_path, monkeypatch) -> Path:
    """A folder that is worked in, with input/data in it."""
    place = tmp_path / 'first'
    shutil.copytree(shapes, place / 'input/data')
    monkeypatch.chdir(place)
    return place


def test_a_path_is_kept_from_the_file_and_found_again(tmp_path, monkeypatch):
    run, data = tmp_path / 'a/output/run/fold0', tmp_path / 'a/input/data'
    run.mkdir(parents=True)
    data.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'a')
    text = path_from(run, Path('input/data'))
    assert text == path_from(Path('output/run/fold0'), data) == '../../../input/data'
    assert path_from(Path('output'), run / 'oof.csv') == './run/fold0/oof.csv'
    assert find_path(run, text) == Path('input/data')
    (tmp_path / 'link').symlink_to(tmp_path / 'a/output')  # its parent is not that of the real folder
    assert path_from(tmp_path / 'link/run/fold0', data) == text
    assert find_path(tmp_path / 'link/run/fold0', text) == Path('input/data')
    monkeypatch.chdir(tmp_path)
    assert find_path(run, text) == Path('a/input/data')
    monkeypatch.chdir('/')
    assert Path('/') / find_path(run, text) == data


def test_what_was_moved_alone_is_found_and_what_is_gone_is_named(tmp_path, monkeypatch):
    old, run, home = (
        tmp_path / 'kaggle/output/run/fold0',
        tmp_path / 'disk/output/run/fold0',
        tmp_path / 'home',
    )
    for folder in (old, run, home / 'input/data', tmp_path / 'kaggle/input/data'):
        folder.mkdir(parents=True)
    monkeypatch.chdir(home)
    kept = path_from(old, tmp_path / 'kaggle/input/data')
    assert find_path(run, kept) == Path('input/data')  # the output alone
    assert find_path(run, 'input/data') == Path('input/data')  # as earlier versions kept it
    gone = str(tmp_path / 'gone/input/data')
    assert find_path(run, gone) == Path('input/data')
    shutil.rmtree(home / 'input/data')
    assert find_path(run, kept) == Path('input/data')  # where it should be
    shutil.rmtree(home / 'input')
    shutil.rmtree(tmp_path / 'kaggle')
    assert find_path(run, gone) == Path(gone)
    assert find_path(run, '../../../photos') == tmp_path / 'disk/photos'
    assert find_path(run, 'timm') == Path('timm')


def test_the_config_of_a_run_keeps_its_paths_from_there(place):
    Path('weights.pt').touch()
    extra = [{'root': 'input/taco', 'share': 0.1}]
    values = {'name': 'run', 'weights': 'weights.pt', 'encoder_weights': 'timm', 'extra_data': extra}
    cfg = make_config(values, 'here')
    folder = open_run(cfg, 0, overwrite=False)
    kept = read_yaml(folder / 'config.yaml')
    assert kept['data_root'] == '../../../input/data' and kept['weights'] == '../../../weights.pt'
    assert kept['extra_data'][0]['root'] == '../../../input/taco' and kept['encoder_weights'] == 'timm'
    assert 'output_dir' not in kept and str(place) not in (folder / 'config.yaml').read_text()
    assert read_run_config(folder) == load_config(folder / 'config.yaml') == cfg
    assert check_run(cfg, 0, resume=True, overwrite=False) == []
    os.chdir(place.rename(place.with_name('second')))
    assert read_run_config(folder) == cfg  # nothing has changed from there
    Path('weights.pt').unlink()
    Path('output').rename('../elsewhere')
    moved = cfg.model_copy(update={'output_dir': Path('../elsewhere')})
    assert check_run(moved, 0, resume=True, overwrite=False) == []
    assert read_run_config(moved.run_dir(0)).output_dir == Path('../elsewhere').resolve()
    (moved.run_dir(0) / 'config.yaml').write_text(dump_config(cfg))  # as earlier versions wrote it
    assert read_run_config(moved.run_dir(0)).data_root == Path('input/data')
    assert dump_run_config(Config(), moved.run_dir(0)).startswith('#')


@pytest.mark.slow
def test_output_and_data_are_moved_and_all_goes_on(place, capsys, monkeypatch):
    """Train two models and a pseudo-label run, predict, search a recipe, make a soup; then move it all."""
    values = {**TINY, 'head_channels': 8, 'batch_size': 6}
    Path('tiny.yaml').write_text('\n'.join(f'{key}: {value}' for key, value in values.items()))
    for seed, name in enumerate(('one', 'two')):
        cfg = load_config('tiny.yaml', [f'name={name}', f'seed={seed}'])
        train.main(cfg, 0)
        for split in ('oof', 'test'):
            infer.main(cfg, 0, split, save_probs=True)
    csvs = [f'output/{name}/fold0/test.csv' for name in ('one', 'two')]
    ensemble.main([*csvs, '--out', 'output/submission.csv', '--search'])
    evaluate.command(['calibrate', 'output/one'])
    sources = [Path(csv).with_name('best.pt') for csv in csvs]
    soup.main(load_config('tiny.yaml', ['name=soup']), 0, sources)
    pseudo.command(['--cfg', 'tiny.yaml', '--fold', '0', '--teacher', 'one', '--set', 'name=one'])
    viz.command(['report', '--name', 'one'])
    for kept in [*Path('output').rglob('*.yaml'), *Path('output').rglob('*.json')]:
        assert str(place) not in kept.read_text(), kept
    before = Path('output/submission.csv').read_bytes()

    home = place.with_name('home')
    (home / 'photos').mkdir(parents=True)
    place.rename(home / 'work')
    monkeypatch.chdir(home / 'work')
    check_commands(Path('output'), before, capsys)  # both together, to another folder
    shutil.move('output', home / 'disk')
    shutil.move('input/data', home / 'photos/data')
    shutil.rmtree('input')
    check_commands(home / 'disk', before, capsys, home / 'photos/data')  # each to another place
    with pytest.raises(BadInput, match='no such folder; .*--data DIR') as error:
        viz.command(['report', '--name', 'one', '--output', str(home / 'disk')])
    assert '\n' not in str(error.value)


def check_commands(output: Path, before: bytes, capsys, data: Path | None = None) -> None:
    """Run the commands on the moved output, as one types them, with the data root if it is elsewhere."""
    words, changes = (['--data', str(data)], [f'data_root={data}']) if data else ([], [])
    cfg = load_config(output / 'one/fold0/config.yaml', changes)
    assert cfg.output_dir.resolve() == output.resolve()
    infer.main(cfg, 0, 'oof', save_probs=True)
    infer.main(load_config(output / 'soup/fold0/config.yaml', changes), 0, 'test')
    csvs = [str(output / name / 'fold0/test.csv') for name in ('one', 'two')]
    out, recipe = output / 'submission.csv', output / 'ensemble.yaml'
    ensemble.main([*csvs, '--out', str(out), '--recipe', str(recipe), *words])
    assert out.read_bytes() == before
    capsys.readouterr()
    for command in ('report', 'suspects'):
        viz.command([command, '--name', 'one', '--output', str(output), *words])
    assert 'without the ensemble' not in capsys.readouterr().out
    assert 'above its best model' in (output / 'one/report.html').read_text()
    runs = [str(output / name) for name in ('one', 'two')]
    evaluate.command(['compare', *runs, *(words or ['--data', 'input/data'])])
    places = [f'output_dir={output}', *changes]
    resumed = ['--fold', '0', '--teacher', 'one', '--resume', '--set', 'name=one', *places]
    pseudo.command(['--cfg', 'tiny.yaml', *resumed])
