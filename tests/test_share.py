"""Shared models: written by tools.share, predicted with by infer.py and from Python, fetched from a hub, and
trained on; what is broken or hostile is one line.
"""

import http.server
import json
import re
import threading
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_docs import blocks_of

import infer
import train
from config import load_config
from engine import hub
from engine.checkpoint import load_checkpoint, load_model
from engine.inference import photo_mask
from tools import share
from utils.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    'README.md',
    'competition.yaml',
    'config.yaml',
    'fold0.safetensors',
    'fold1.safetensors',
    'models.yaml',
]


@pytest.fixture(scope='module')
def run(shapes, shared_cache, tmp_path_factory):
    """A run of two folds, its config, and the two as shared folders: of both folds, and of fold 0."""
    from conftest import TINY

    root = tmp_path_factory.mktemp('run')
    places = {'data_root': shapes, 'cache_dir': shared_cache, 'output_dir': root / 'output'}
    lines = [f'{key}: {value}' for key, value in {**TINY, **places, 'tta_flips': '[h]'}.items()]
    (root / 'tiny.yaml').write_text('\n'.join(lines))
    cfg = load_config(root / 'tiny.yaml')
    for fold in range(2):
        train.main(cfg, fold)
    infer.main(cfg, None, 'oof')
    share.command([str(root / 'output/tiny'), str(root / 'both'), '--license', 'mit', '--data', 'Boxes, CC0'])
    share.command([str(root / 'output/tiny/fold0'), str(root / 'one')])
    return root


@pytest.fixture
def one(run, tmp_path):
    """A copy of a shared folder, to break."""
    folder = tmp_path / 'one'
    folder.mkdir()
    for path in (run / 'one').iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def predict(run, tmp_path, *words: str) -> None:
    infer.command([*words, '--set', f'data_root={data_of(run)}', f'cache_dir={tmp_path / "cache"}',
                   f'output_dir={tmp_path / "output"}', 'device=cpu', 'workers=0'])  # fmt: skip


def data_of(run: Path) -> Path:
    return load_config(run / 'tiny.yaml').data_root


def test_files_of_a_shared_run(run):
    assert sorted(path.name for path in (run / 'both').iterdir()) == FILES
    names = [*FILES[:3], 'model.safetensors', FILES[-1]]
    assert sorted(path.name for path in (run / 'one').iterdir()) == names
    for path in [*(run / 'both').iterdir(), *(run / 'one').iterdir()]:
        assert str(run).encode() not in path.read_bytes(), f'{path.name} has a path of this machine'
    best, state = (run / f for f in ('output/tiny/fold0/best.pt', 'one/model.safetensors'))
    best, state = load_checkpoint(best)['model'], load_file(state)
    assert best.keys() == state.keys() and all(torch.equal(best[key], state[key]) for key in best)


def test_predictions_are_those_of_the_run_to_the_byte(run, tmp_path):
    cfg = load_config(run / 'tiny.yaml')
    infer.main(cfg, None, 'test', save_probs=True)
    predict(run, tmp_path, '--model', str(run / 'both'), '--split', 'test', '--save-probs')
    for place in ('', 'fold0/', 'fold1/'):
        for name in ('test.csv', 'test_probs.npy'):
            ours, theirs = (
                folder / f'{place}{name}' for folder in (run / 'output/tiny', tmp_path / 'output/tiny-shared')
            )
            assert ours.read_bytes() == theirs.read_bytes(), ours
    photo = next((data_of(run) / 'batch_01').iterdir())
    for option, *words in (['--cfg', run / 'tiny.yaml', '--fold', '0'], ['--model', run / 'one']):
        out = ['--image', photo, '--out', tmp_path / f'{option}.png']
        infer.command([option, *map(str, [*words, *out])])
    assert (tmp_path / '--cfg.png').read_bytes() == (tmp_path / '--model.png').read_bytes()
    photo = cv2.imread(str(photo))[..., ::-1].copy()
    masks = [photo_mask(load_model(run / source), photo) for source in ('output/tiny/fold0', 'one')]
    assert masks[0].shape == photo.shape[:2] and (masks[0] == masks[1]).all()
    plain = photo_mask(load_model(run / 'one', tta_flips=()), photo)
    assert not (plain == masks[0]).all(), 'the views are those of the config, or those that are given'


def test_update_knows_the_shared_files(one, run, tmp_path, capsys):
    words = ['--model', str(one), '--split', 'test', '--update']
    predict(run, tmp_path, *words)
    with pytest.raises(SystemExit) as end:
        predict(run, tmp_path, *words)
    assert end.value.code == 0 and 'is up to date' in capsys.readouterr().out
    state = load_file(one / 'model.safetensors')
    save_file({key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in state.items()},
              one / 'model.safetensors')  # fmt: skip
    predict(run, tmp_path, *words)
    assert 'wrote' in capsys.readouterr().out


def test_card(run, monkeypatch):
    text = (run / 'both/README.md').read_text()
    card = ModelCard(text).data
    assert card.license == 'mit' and card.pipeline_tag == 'image-segmentation' and 'upernet' in card.tags
    (result,) = card.eval_results
    score = re.search(r'\| all folds \| ([\d.]+) \| [\d.]+ to [\d.]+ \|', text)
    assert result.metric_type == 'mean_iou' and float(score[1]) == result.metric_value
    assert result.dataset_name == 'Boxes, CC0' and 'on 24 photos whose labels the model had not seen' in text
    assert '| 10 | Clothing |' in text and "tta_flips: ['h']" in text and 'longer side 64' in text
    text = (run / 'one/README.md').read_text()
    assert ModelCard(text).data.license == 'unknown'
    photo = next((data_of(run) / 'batch_01').iterdir())
    monkeypatch.chdir(run)
    (code,) = (text for language, text in blocks_of(run / 'one/README.md') if language == 'python')
    cv2.imwrite('photo.jpg', cv2.imread(str(photo)))
    names = {}
    exec(code, names)
    assert names['mask'].shape == names['photo'].shape[:2] and len(code.splitlines()) <= 10


def test_snippet_of_the_page(run, monkeypatch):
    (code,) = (text for language, text in blocks_of(ROOT / 'docs/share.md') if language == 'python')
    monkeypatch.chdir(run)
    cv2.imwrite('photo.jpg', cv2.imread(str(next((data_of(run) / 'batch_01').iterdir()))))
    names = {}
    exec(code.replace('output/convnext/fold0', 'output/tiny/fold0'), names)
    assert names['mask'].shape == names['photo'].shape[:2] and len(code.splitlines()) <= 10


def test_scores_of_the_validation_without_predictions(run, tmp_path):
    folder = tmp_path / 'tiny/fold0'
    folder.mkdir(parents=True)
    for name in ('best.pt', 'config.yaml', 'metrics.csv', 'provenance.yaml'):
        (folder / name).write_bytes((run / 'output/tiny/fold0' / name).read_bytes())
    share.main(folder, tmp_path / 'shared')
    text = (tmp_path / 'shared/README.md').read_text()
    score = load_checkpoint(folder / 'best.pt')['score']
    assert re.search(rf'\| fold 0 \| {score:.4f} \| [\d.]+ to [\d.]+ \|', text)
    assert 'in one plain view' in text


def test_a_folder_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match='exists; give another folder'):
        share.command([str(run / 'output/tiny'), str(run / 'both')])
    with pytest.raises(BadInput, match='is a shared folder'):
        share.command([str(run / 'both'), str(tmp_path / 'out')])
    with pytest.raises(BadInput, match='no such folder'):
        share.command([str(run / 'none'), str(tmp_path / 'out')])
    with pytest.raises(SystemExit):
        share.command([str(run / 'output/tiny'), str(tmp_path / 'out'), '--license', 'My Own'])

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(share, 'write_facts', stop)
    with pytest.raises(KeyboardInterrupt):
        share.main(run / 'output/tiny', tmp_path / 'out')
    assert [path.name for path in tmp_path.iterdir()] == ['.out.lock']


def test_a_training_starts_from_it(run, one, tmp_path):
    cfg = load_config(run / 'tiny.yaml', [f'weights={run / "both"}'])
    for fold in range(2):
        theirs, start = load_checkpoint(run / f'output/tiny/fold{fold}/best.pt'), train.load_start(cfg, fold)
        assert theirs['held_out'] == start['held_out'], 'the model of the same fold has not seen its photos'
        ours = train.build_model(cfg, start, resume=False)[0].state_dict()
        assert all(torch.equal(ours[name], theirs['model'][name]) for name in ours)
    cfg = load_config(run / 'tiny.yaml', [f'output_dir={tmp_path / "b"}', f'weights={one}'])
    train.main(cfg, 1)
    held_out = load_checkpoint(tmp_path / 'b/tiny/fold1/best.pt')['held_out']
    assert held_out is None, 'it has seen photos of fold 1'
    small = json.dumps(['Background', 'Paper'])
    cfg = load_config(
        run / 'tiny.yaml', [f'output_dir={tmp_path / "c"}', f'weights={one}', f'classes={small}']
    )
    with pytest.raises(BadInput, match='is of a model of 11 classes, the data has 2; encoder_weights'):
        train.build_model(cfg, train.load_start(cfg, 0), resume=False)


def drop(name: str, text: str):
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(text, '', 1))


def add(name: str, line: str):
    return lambda folder: (folder / name).write_text(f'{(folder / name).read_text()}\n{line}\n')


def tensors(change):
    def apply(folder: Path) -> None:
        state = load_file(folder / 'model.safetensors')
        change(state)
        save_file(state, folder / 'model.safetensors')

    return apply


def cut(folder: Path) -> None:
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    torch.save({'model': {}}, folder / 'model.safetensors')


BROKEN = {
    'a key that is misspelt': (add('config.yaml', 'epohs: 3'), "unknown key 'epohs'; did you mean 'epochs'"),
    'a path': (add('config.yaml', 'output_dir: /etc'), "key 'output_dir' is of a machine"),
    'a tracker': (add('config.yaml', 'tracker: wandb'), "key 'tracker' is of a machine"),
    'a tag': (add('config.yaml', 'x: !!python/object/apply:os.system [ls]'), 'tag'),
    'an alias': (add('config.yaml', 'x: &a [1]\ny: *a'), 'without aliases'),
    'a value': (add('config.yaml', 'queries: 0') , 'stands twice'),
    'no config': (lambda folder: (folder / 'config.yaml').unlink(), 'config.yaml: cannot be read'),
    'a large file': (add('competition.yaml', '#' * 2**20), 'is larger than 1 MiB'),
    'a class less': (drop('competition.yaml', '- Clothing\n'), r'is of another model: .* is \(11,'),
    'an unknown fact': (add('models.yaml', 'url: x'), "unknown key 'url'"),
    'no model': (lambda folder: (folder / 'models.yaml').write_text('models: []'), "key 'models'"),
    'thresholds': (add('models.yaml', 'thresholds: [0.5]'), '1 thresholds|stands twice'),
    'no weights': (lambda folder: (folder / 'model.safetensors').unlink(), 'model.safetensors: no such file'),
    'a file cut off': (cut, 'no file of tensors, or cut off'),
    'a pickle': (pickled, 'no file of tensors'),
    'a missing tensor': (tensors(lambda state: state.popitem()), 'is only in the model'),
    'one too many': (tensors(lambda state: state.update(x=torch.ones(1))), 'x is only in the file'),
    'another shape': (
        tensors(lambda state: state.update({key: state[key][:1] for key in [min(state)]})),
        'is of another model: .* there, .* here',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', BROKEN)
def test_what_is_broken_or_hostile_is_one_line(name, one, tmp_path):
    change, message = BROKEN[name]
    change(one)
    for call in (
        lambda: load_model(one),
        lambda: infer.command(['--model', str(one), '--image', str(tmp_path / 'none.jpg')]),
    ):
        with pytest.raises(BadInput) as error:
            call()
        assert '\n' not in str(error.value)
        if call.__code__.co_names[0] == 'load_model':
            assert re.search(message, str(error.value)), error.value


def test_data_of_other_classes_is_refused(run, tmp_path):
    data = tmp_path / 'data'
    data.mkdir()
    for text, message in (
        (
            'classes: [Background, Can]',
            'is of 11 classes, .*competition.yaml has 2; expected the same classes',
        ),
        ('task: multilabel\nclasses: [a, b, c]\nscore_size: own', 'is of 11 classes'),
    ):
        (data / 'competition.yaml').write_text(text)
        with pytest.raises(BadInput, match=message):
            infer.command(['--model', str(run / 'one'), '--split', 'test', '--set', f'data_root={data}'])


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--model', '{run}/one', '--cfg', '{run}/tiny.yaml', '--split', 'test'], 'expected --cfg, or'),
        (['--split', 'test', '--fold', '0'], 'expected --cfg, or --model'),
        (['--cfg', '{run}/tiny.yaml', '--split', 'test'], 'required: --fold'),
        (['--model', '{run}/one', '--split', 'oof'], '--split oof goes with --cfg'),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(words, message, run, capsys):
    with pytest.raises(SystemExit) as end:
        infer.command([word.format(run=run) for word in words])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count('\n') == 1


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['{run}/both', '--fold', '4'], 'both has 0, 1'),
        (['{run}/output/tiny/fold0'], 'is the folder of a run; expected --cfg .*config.yaml --fold 0'),
        (['{run}/none'], 'no such folder; expected a folder that tools.share wrote, or owner/name'),
        (['{run}/both', '--set', 'epohs=1'], "--set epohs=1: unknown key 'epohs'"),
        (['{run}/both', '--set', 'name=tiny', 'output_dir={run}/output'], 'holds a run of its own'),
    ],
)  # fmt: skip
def test_models_that_are_not_there(words, message, run):
    with pytest.raises(BadInput, match=message):
        infer.command(['--model', *(word.format(run=run) for word in words), '--split', 'test'])


def test_load_model_says_what_it_takes(run, tmp_path):
    with pytest.raises(BadInput, match='both: found several folds, expected one of 0, 1'):
        load_model(run / 'both')
    assert load_model(run / 'both', fold=1).fold == 1
    assert load_model(run / 'output/tiny/fold1/best.pt').fold == 1
    with pytest.raises(BadInput, match='load_model: head cannot be changed'):
        load_model(run / 'one', head='fcn')
    with pytest.raises(BadInput, match='found no model'):
        load_model(tmp_path)
    model = load_model(run / 'one')
    for photo in (np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 3)), np.zeros(3, np.uint8)):
        with pytest.raises(BadInput, match=r'photo: found .*, expected \(H, W, 3\) uint8'):
            photo_mask(model, photo)


# --- the hub ------------------------------------------------------------------------------------------------

COMMIT = 'c' * 40


class Hub(http.server.SimpleHTTPRequestHandler):
    """Answer as huggingface.co does for the files of one model, team/boxes."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.seen.append(self.path)
        match = re.fullmatch(rf'/team/boxes/resolve/(?:main|v1|{COMMIT})/([\w.]+)', self.path)
        path = Path(self.directory, match[1]) if match else None
        if path is None or not path.is_file():
            self.send_response(404)
            self.send_header('X-Error-Code', 'EntryNotFound' if match else 'RepoNotFound')
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header('X-Repo-Commit', COMMIT)
        self.send_header('ETag', f'"{len(content)}-{path.name}"')
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(run, tmp_path, monkeypatch):
    """A hub of this test's own, with a cache of its own; ends the server when called."""
    from huggingface_hub import constants, file_download

    with http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), partial(Hub, directory=str(run / 'one'))
    ) as server:
        server.seen = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        monkeypatch.setattr(constants, 'ENDPOINT', address)
        monkeypatch.setattr(
            constants, 'HUGGINGFACE_CO_URL_TEMPLATE', address + '/{repo_id}/resolve/{revision}/{filename}'
        )
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        assert file_download.constants is constants
        yield server
        server.shutdown()


def test_a_model_of_the_hub(server, run, tmp_path, monkeypatch):
    shared = hub.open_shared('team/boxes@v1')
    assert shared.folder.name == COMMIT and shared.folder.is_relative_to(tmp_path / 'hub')
    assert (
        '/team/boxes/resolve/v1/models.yaml' in server.seen
        and f'/team/boxes/resolve/{COMMIT}/config.yaml' in server.seen
    )
    photo = np.zeros((40, 64, 3), np.uint8)
    assert (photo_mask(load_model('team/boxes'), photo) == photo_mask(load_model(run / 'one'), photo)).all()
    cfg = load_config(run / 'tiny.yaml', ['weights=team/boxes'])
    assert train.load_start(cfg, 0)['fold'] == 0
    with pytest.raises(
        BadInput, match='team/other: no such folder, and cannot be fetched from the hub: .*404'
    ):
        load_model('team/other')
    server.shutdown()
    server.server_close()
    assert load_model('team/boxes').fold == 0, 'the copy in the cache is enough'
    with pytest.raises(
        BadInput, match='team/new: no such folder, and cannot be fetched .* hf download team/new'
    ) as error:
        load_model('team/new')
    assert '\n' not in str(error.value)


def test_a_repository_of_other_files_is_refused(server, one):
    server.RequestHandlerClass = partial(Hub, directory=str(one))
    (one / 'models.yaml').unlink()
    with pytest.raises(
        BadInput, match='team/boxes: has no models.yaml; expected a model that tools.share wrote'
    ):
        load_model('team/boxes')
