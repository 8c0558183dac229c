"""Each command does its work if the reader of its output is gone, its terminal has ASCII alone, and folders
have Korean names.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_import_cvat
import test_import_json
import test_import_labelstudio
import test_import_rle
import test_import_set
from conftest import TINY, write_csv, write_set
from entry_points import MODULES, ROOT, SCRIPTS, entry, parser_of, split_command
from overlaps import write_overlaps
from test_formats import small_yolo
from test_taco import photo_bytes, write_annotations
from test_terminal import commands_of

import config
from config import CLASSES, HOME, Config, dump_config
from data.coco import draw_mask, read_coco
from utils.cli import run_script
from voting.thresholds import HISTOGRAM_TYPE

Job = tuple[list[str], list[Path]]  # a command, and the results that it makes
ELSEWHERE = {  # commands that are not run here, and why
    'viz.py app': 'serves until it is stopped: test_app.py',
    '-m tools.gpu': 'needs a GPU: test_gpu_check.py',
    '-m tools.bench': 'minutes, and writes nothing',
    '-m tools.bench.scale': 'minutes, and writes nothing',
    '-m tools.offline predict': 'test_offline.py',
    '-m tools.compare': 'trains: test_compare.py',
    '-m tools.share': 'needs a model: test_share.py',
}


class Deaf:
    """A standard output without a reader, and a standard error that is a file; both take ASCII alone."""

    def __init__(self, errors: io.TextIOWrapper) -> None:
        self.errors = errors
        reader, self.writer = os.pipe()
        os.close(reader)

    def run(self, line: list[str], results: list[Path]) -> None:
        """Run a command as its script does; check that it ends well, and that its results are there."""
        script, words = split_command(line)
        os.dup2(self.writer, 1)
        sys.stdout = os.fdopen(1, 'w', encoding='ascii', closefd=False)
        sys.stderr, sys.argv = self.errors, [script, *words]
        assert not any(path.exists() for path in results), f'{line}: made by another command'
        with pytest.raises(SystemExit) as end:
            run_script(entry(script))
        self.errors.seek(0)
        assert end.value.code == 0, f'{line}: {self.errors.read()[-2000:]}'
        assert [path for path in results if not path.exists()] == [], line


@pytest.fixture
def deaf(monkeypatch, tmp_path) -> Iterator[Deaf]:
    saved = os.dup(1)
    monkeypatch.chdir(ROOT)
    with (tmp_path / 'errors').open('w+', encoding='ascii') as errors, monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', sys.stdout)
        patch.setattr(sys, 'argv', sys.argv)
        patch.setattr(sys, 'stderr', sys.stderr)
        one = Deaf(errors)
        yield one
        os.dup2(saved, 1)
    os.close(saved)
    os.close(one.writer)


def write_models(output: Path, data: Path) -> list[list[str]]:
    """Write two runs of two folds, as if they were trained; return their oof.csv, then their test.csv."""
    rng, coco = np.random.default_rng(0), read_coco(data, 'train', HOME)
    tests = [photo.file_name for photo in read_coco(data, 'test', HOME).photos]
    for name in ('a', 'b'):
        for fold in range(2):
            folder, masks = output / name / f'fold{fold}', {}
            for photo in coco.photos[fold::2]:
                masks[photo.file_name] = np.kron(draw_mask(photo), np.ones((4, 4), np.uint8))
                masks[photo.file_name][: rng.integers(40)] = rng.integers(11)
            write_csv(folder / 'oof.csv', masks)
            write_csv(folder / 'test.csv', dict.fromkeys(tests, masks[photo.file_name]))
            probs = np.full((len(masks), len(CLASSES), 256, 256), 5, np.uint8)
            for row, mask in enumerate(masks.values()):
                np.put_along_axis(probs[row], mask[None].astype(np.intp), 200, 0)
            np.save(folder / 'oof_probs.npy', probs)
            (folder / 'config.yaml').write_text(
                dump_config(Config(name=name, data_root=data, folds=2, epochs=3))
            )
            rows = '\n'.join(f'{epoch},{epoch},1e-3,0.5,0.{epoch}' for epoch in range(3))
            (folder / 'metrics.csv').write_text(f'epoch,step,lr,loss,miou\n{rows}\n')
    return [[*map(str, sorted(output.glob(f'[ab]/fold*/{split}.csv')))] for split in ('oof', 'test')]


def write_planes(root: Path) -> Path:
    """Write a data set of classes that overlap, and the histograms of a run on it; return the run."""
    write_overlaps(root, [(16, 20)] * 3, test=1)
    folder = root / 'run/fold0'
    folder.mkdir(parents=True)
    coco = read_coco(root, 'train', config.read_competition(root))
    with coco.form.writer(folder / 'oof.csv') as writer:
        for photo in coco.photos:
            writer.write(photo.file_name, np.zeros((3, *photo.size), np.uint8))
    counts = np.random.default_rng(0).integers(0, 9, (2, 3, 2, 256), HISTOGRAM_TYPE)
    np.save(folder / 'oof_histograms.npy', counts)
    return folder.parent


def import_jobs(folder: Path) -> Iterator[Job]:
    """List the imports of prepare.py, with small sources."""
    masks = test_import_set.write_source(folder / 'from-masks', 1)
    yield ['prepare.py', *masks, str(folder / 'from')], [folder / 'from/train_all.json']
    drawn = test_import_cvat.polygon('can', 1, 1, 20, 20)
    words = test_import_cvat.write(folder / 'cvat', test_import_cvat.image('a.png', drawn))
    yield ['prepare.py', *words], [folder / 'cvat/out/train_all.json']
    (folder / 'json').mkdir()
    points = [[1, 1], [9, 1], [9, 9]]
    test_import_json.write(folder / 'json', 'a', [test_import_json.poly('can', points)])
    words = test_import_json.words(folder / 'json')
    yield ['prepare.py', *words], [folder / 'json/out/train_all.json']
    tool = test_import_labelstudio
    result = tool.result(tool.polygon('can', *tool.box(1, 1, 9, 9)))
    words = tool.write(folder / 'studio', [tool.task(1, 'a.png', [result])])
    yield ['prepare.py', *words], [folder / 'studio/out/train_all.json']
    photos = test_import_rle.write_photos(folder / 'rle/photos')
    (folder / 'rle/train.csv').write_text(test_import_rle.CSVS['image, class, mask'][0])
    words = ['from-rle', '--csv', str(folder / 'rle/train.csv'), '--photos', str(photos)]
    yield ['prepare.py', *words, '--out', str(folder / 'rle/out')], [folder / 'rle/out/train_all.json']
    yolo = str(small_yolo(folder / 'yolo', '0 0 0 1 0 1 1'))
    words = ['yolo', '--yaml', yolo, '--out', str(folder / 'yolo_out')]
    yield ['prepare.py', *words], [folder / 'yolo_out/train_all.json']
    (folder / 'coco').mkdir()
    export = write_set(folder / 'coco', 2, 1, 64)
    (export / 'train_all.json').rename(export / 'instances_default.json')
    yield ['prepare.py', 'coco', '--data', str(export)], [export / 'train_all.json']
    (folder / 'originals/batch_1').mkdir(parents=True)
    (folder / 'originals/batch_1/a.jpg').write_bytes(photo_bytes())
    server = argparse.Namespace(server_address=('photos.example', 80))
    annotations = write_annotations(folder / 'taco.json', server, ['a'])
    words = ['taco', '--annotations', str(annotations), '--photos', str(folder / 'originals')]
    yield ['prepare.py', *words, '--out', str(folder / 'taco')], [folder / 'taco/train_all.json']


def light_jobs(folder: Path) -> Iterator[Job]:
    """List commands that need no network, each with a source of its own or what an earlier one made."""
    yield from import_jobs(folder)
    yield ['config.py'], []
    yield (
        ['prepare.py', 'demo', '--train', '2', '--test', '1', '--out', str(folder / 'demo')],
        [folder / 'demo/test.json'],
    )
    data, out = write_set(folder / '데이터', 6, 2, 64), folder / 'out'
    root, output = ['--data', str(data)], folder / 'output'
    yield ['prepare.py', 'check', *root], []
    yield ['prepare.py', 'competition', *root], [data / 'competition.yaml']
    (data / 'competition.yaml').unlink(missing_ok=True)
    yield ['prepare.py', 'masks', *root, '--out', str(folder / 'masks')], [folder / 'masks/batch_01']
    yield (
        ['prepare.py', 'test', '--photos', str(folder / 'demo'), '--data', str(folder / 'tests')],
        [folder / 'tests/test.json'],
    )
    oofs, tests = write_models(output, data)
    cfg = ['--cfg', str(output / 'a/fold0/config.yaml')]
    cache = ['--set', f'cache_dir={folder / "cache"}', 'cache_size=256']
    yield ['prepare.py', 'folds', *cfg, *cache], [folder / 'cache/folds.csv']
    for name, options in (('vote', []), ('search', ['--search'])):
        words = ['ensemble.py', *tests, *options, *root, '--out', str(out / f'{name}.csv')]
        made = [out / 'ensemble.yaml'] if options else []
        yield words, [out / f'{name}.csv', *made]
    words = ['ensemble.py', *tests, '--recipe', str(out / 'ensemble.yaml'), *root]
    yield [*words, '--out', str(out / 'again.csv')], [out / 'again.csv']
    yield ['submission.py', 'check', str(out / 'vote.csv'), *root], []
    hidden = folder / 'hidden'
    shutil.copytree(data, hidden)
    sample = ['submission.py', 'from-sample', tests[0], '--data', str(hidden)]
    yield sample, [hidden / 'competition.yaml']
    yield ['evaluate.py', 'score', oofs[0], '--labels', str(write_labels(data, oofs[0]))], []
    yield ['evaluate.py', 'compare', oofs[0], oofs[2], *root], []
    yield ['evaluate.py', 'seeds', str(output / 'a'), str(output / 'b'), *root], []
    yield ['evaluate.py', 'calibrate', str(output / 'a'), *root], [output / 'a/calibration.yaml']
    yield ['evaluate.py', 'epochs', str(output / 'a')], []
    planes = write_planes(folder / 'planes')
    words = ['evaluate.py', 'thresholds', str(planes), '--data', str(folder / 'planes')]
    yield words, [planes / 'thresholds.yaml']
    for name in ('report', 'suspects'):
        result = output / 'a' / ('report.html' if name == 'report' else 'suspects/suspects.csv')
        yield ['viz.py', name, '--name', 'a', '--output', str(output)], [result]
    picture = ['--csv', oofs[0], *root, '--split', 'train', '--count', '1', '--out', str(folder / 'p.png')]
    yield ['viz.py', 'pictures', *picture], [folder / 'p.png']
    yield ['-m', 'tools.postprocess', 'search', *oofs[:2], *root], []
    words = ['apply', oofs[0], '--islands', '3', *root, '--out', str(out / 'cleaned.csv')]
    yield ['-m', 'tools.postprocess', *words], [out / 'cleaned.csv']


def write_labels(data: Path, csv: str) -> Path:
    """Write a COCO file of those training photos that a CSV has."""
    content, text = json.loads((data / 'train_all.json').read_text()), Path(csv).read_text()
    content['images'] = [image for image in content['images'] if image['file_name'] in text]
    ids = {image['id'] for image in content['images']}
    content['annotations'] = [one for one in content['annotations'] if one['image_id'] in ids]
    (data / 'labels.json').write_text(json.dumps(content))
    return data / 'labels.json'


def heavy_jobs(folder: Path) -> Iterator[Job]:
    """List commands that train, or need a network."""
    data = write_set(folder / '데이터', 12, 2, 64)
    output, path = folder / 'output', folder / 'run.yaml'
    places = {'data_root': data, 'cache_dir': folder / 'cache', 'output_dir': output, 'name': 'run'}
    path.write_text(dump_config(Config(**TINY | places)))
    cfg, fold = ['--cfg', str(path)], ['--fold', '0']
    run, other, root = output / 'run', output / 'other', ['--data', str(data)]
    yield ['models.py', *cfg], []
    plan = ['--memory', '8', '--hours', '9', '--device', 'cpu', '--out', str(folder / 'plan.yaml')]
    yield ['prepare.py', 'plan', *root, *plan], [folder / 'plan.yaml']
    yield ['viz.py', 'augment', *cfg, '--count', '1', '--out', str(folder / 'a.png')], [folder / 'a.png']
    yield ['train.py', *cfg, *fold], [run / 'fold0/best.pt', run / 'fold0/metrics.csv']
    yield ['train.py', *cfg, *fold, '--set', 'name=other', 'seed=1'], [other / 'fold0/last.pt']
    for split in ('oof', 'test'):
        words = ['infer.py', *cfg, *fold, '--split', split, '--save-probs']
        yield words, [run / f'fold0/{split}.csv', run / f'fold0/{split}_probs.npy']
    words = ['pseudo.py', *cfg, *fold, '--teacher', 'run', '--schedule', 'half']
    yield words, [output / 'run-pseudo/fold0/best.pt']
    soup = [str(folder / 'fold0/best.pt') for folder in (run, other)]
    soup += [*cfg, *fold, '--set', 'name=soup']
    yield ['-m', 'tools.soup', *soup], [output / 'soup/fold0/best.pt']
    yield ['-m', 'tools.search_tta', *cfg, *fold, '--scales', '--rotations'], []
    yield ['-m', 'tools.export_onnx', *cfg, *fold], [run / 'fold0/model.onnx']
    words = ['pack', str(run), '--packages', 'none', '--out', str(folder / 'packed')]
    yield ['-m', 'tools.offline', *words], [folder / 'packed']


def test_no_command_loses_its_work(tmp_path, deaf):
    for line, results in light_jobs(tmp_path / '한국'):
        deaf.run(line, results)


@pytest.mark.slow
def test_no_command_that_trains_loses_its_work(tmp_path, deaf):
    for line, results in heavy_jobs(tmp_path / '한국'):
        deaf.run(line, results)


def test_every_command_is_run(tmp_path, monkeypatch):
    """Or test_no_command_loses_its_work would not see a new one."""
    run = set()
    for line, _ in [*light_jobs(tmp_path / 'a'), *heavy_jobs(tmp_path / 'b')]:
        script, words = split_command(line)
        run |= {script, f'{script} {words[0]}' if words else script}
    for script in SCRIPTS:
        for parser in commands_of(parser_of(script, [], monkeypatch)):
            command = parser.prog.removeprefix('python ')
            assert command in run or script in ELSEWHERE or command in ELSEWHERE, command


# --- real processes, in other environments ----------------------------------------------------------------


def typed(command: str, **env: str) -> subprocess.CompletedProcess:
    """Type a command to bash; its first word is `python`, this one."""
    words = ['bash', '-c', f'"$0" {command.removeprefix("python ")}', sys.executable]
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONUNBUFFERED'} | env
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope='module')
def korean(tmp_path_factory) -> Path:
    """A data root whose photos have Korean names."""
    root = write_set(tmp_path_factory.mktemp('한국') / '데이터', 2, 1, 64)
    (root / 'batch_01').rename(root / '사진')
    for path in root.glob('*.json'):
        path.write_text(path.read_text().replace('batch_01', '사진'))
    return root


@pytest.mark.parametrize('env', [
    {'PYTHONIOENCODING': 'ascii'},
    {'PYTHONIOENCODING': 'latin-1:strict', 'PYTHONOPTIMIZE': '2'},
    {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
], ids=lambda env: ' '.join(env))  # fmt: skip
def test_other_encodings_and_no_docstrings(env, korean, tmp_path):
    done = typed(f'python prepare.py masks --data {korean} --out {tmp_path}/가면', **env)
    assert (done.returncode, done.stderr) == (0, '')
    assert len(list((tmp_path / '가면/사진').iterdir())) == 2
    assert ('가면' if 'LC_ALL' in env else r'\uac00\uba74') in done.stdout


def test_closed_standard_streams_are_given_to_no_file(korean, tmp_path):
    """A file that gets number 1 would hold what is printed there."""
    done = typed(f'python prepare.py masks --data {korean} --out {tmp_path}/m <&- >&- 2>&-')
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    code = 'from utils.cli import exit_status; import os; exit_status(lambda: os.write(1, b"x") * 0)'
    numbers = typed(f'python -c \'{code}; exit(open("config.py").fileno())\' <&- >&- 2>&-').returncode
    assert numbers == 3


def test_what_is_not_utf8_is_refused():
    done = typed(r"python prepare.py check --data $'\xff'")
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert r"'\udcff' is not UTF-8; give the file or folder another name" in done.stderr


def test_a_search_whose_reader_leaves(tmp_path):
    data = write_set(tmp_path / 'd', 4, 2, 64)
    _, tests = write_models(tmp_path / 'output', data)
    out = tmp_path / 'out/vote.csv'
    words = ' '.join(['ensemble.py', *tests, '--search', '--data', str(data), '--out', str(out)])
    done = typed(f'python {words} | head -1; exit ${{PIPESTATUS[0]}}')
    assert done.returncode == 0 and 'Traceback' not in done.stderr
    assert out.exists() and out.with_name('ensemble.yaml').exists()
    assert done.stdout == 'mIoU on the photos out of fold:\n'


def test_docstrings_are_used_by_parsers_alone():
    """python -OO leaves None in their place."""
    sources = {name: (ROOT / name).read_text() for name in MODULES}
    used = [
        name for name, text in sources.items() if '__doc__' in text.replace('ArgumentParser(__doc__)', '')
    ]
    assert used == []
