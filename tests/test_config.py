"""The config: every shipped file loads, and every mistake is one clear line that names the file."""

import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from config import (
    HOME,
    Competition,
    Config,
    ExtraData,
    LossTerm,
    Slices,
    Submission,
    describe_config,
    dump_config,
    keys_free_in_inference,
    keys_free_on_resume,
    load_config,
    make_config,
    read_competition,
    write_competition,
)
from losses import LOSSES
from networks.encoders import find_custom_encoder, is_smp_encoder, timm_cfg
from networks.heads import HEADS
from utils.errors import BadInput
from utils.key_tables import read_meanings
from utils.yaml_files import read_yaml

CONFIGS = sorted(Path(__file__).resolve().parents[1].glob('configs/*.yaml'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_loads_and_is_short(path):
    cfg = load_config(path)
    assert cfg.name == path.stem
    assert cfg.head in HEADS or cfg.head.startswith('smp-')
    assert set(cfg.loss) <= set(LOSSES)
    assert find_custom_encoder(cfg.encoder) or timm_cfg(cfg.encoder) or is_smp_encoder(cfg.encoder)
    assert len(path.read_text().splitlines()) <= 20
    assert not {'fold', 'data_root', 'cache_dir', 'output_dir'} & set(read_yaml(path))


def write(tmp_path, text):
    path = tmp_path / 'x.yaml'
    path.write_text(text)
    return path


def test_a_data_root_says_what_it_is(tmp_path):
    assert read_competition(tmp_path) is None and read_competition(tmp_path / 'none') is None
    (tmp_path / 'competition.yaml').write_text('')
    assert read_competition(tmp_path) == HOME
    competition = Competition(classes=('background', 'can'), crowds='objects', intensity=(0, 4095))
    write_competition(tmp_path, competition)
    assert read_competition(tmp_path) == competition
    path = write(tmp_path, f'data_root: {tmp_path}\nclass_weights: [1, 2]')
    cfg = load_config(path)
    assert cfg.competition == competition and cfg.classes == ('background', 'can')
    assert load_config(path, ['classes=[background, can]']) == cfg
    path.write_text(dump_config(cfg))  # a copy of a run's config
    assert load_config(path) == cfg
    (tmp_path / 'competition.yaml').unlink()
    assert load_config(path) == cfg
    with pytest.raises(BadInput, match='class_weights: found 2, expected 11'):
        load_config(write(tmp_path, f'data_root: {tmp_path}\nclass_weights: [1, 2]'))


def test_categories_are_matched_by_name():
    competition = Competition(classes=('Background', 'Big can'), categories={'Tin ': 'Big can'})
    found = [competition.class_id(name) for name in ('big  CAN', 'tin', 'background', 'bottle')]
    assert found == [1, 1, 0, None]


@pytest.mark.parametrize('name', ['competition.yml', 'competition.yaml.txt'])
def test_a_file_of_another_name_is_not_passed_over(name, tmp_path):
    (tmp_path / name).write_text('crowds: objects')
    with pytest.raises(BadInput, match=f'{name}: is not read; rename it to competition.yaml'):
        read_competition(tmp_path)


@pytest.mark.parametrize('encoding', ['latin-1', 'utf-16'])
def test_a_file_in_no_utf_8(encoding, tmp_path):
    (tmp_path / 'competition.yaml').write_text('classes: [Background, café]', encoding=encoding)
    with pytest.raises(BadInput, match='cannot be read: .*; save it as UTF-8'):
        read_competition(tmp_path)


def test_a_config_that_contradicts_its_data_is_refused(tmp_path):
    write_competition(tmp_path, Competition(classes=('background', 'can')))
    message = r'--set classes=\[a, b\]: classes is \[a, b\], but .*yaml says \[background, can\]; leave'
    with pytest.raises(BadInput, match=message):
        load_config(write(tmp_path, ''), ['classes=[a, b]'], data_root=tmp_path)
    path = write(tmp_path, 'competition: {crowds: objects}')
    with pytest.raises(BadInput, match='x.yaml: crowds is objects, but .* says ignored'):
        load_config(path, [f'data_root={tmp_path}'])


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('class: [a, b]', "unknown key 'class'; did you mean 'classes'"),
        ('classes: [a]', 'expected the background and an object'),
        ('classes: [a, b, A ]', 'two of them have the same name'),
        ('classes: [can, background]', "'background' is not the first; the background is"),
        ('classes: [a, ""]', 'not a name for a class'),
        ('categories: {tin: can}', "categories: tin is 'can', which is none of the classes"),
        ('categories: [tin]', "key 'categories': found \\['tin'\\], expected {name: value}"),
        ('crowds: object', "key 'crowds': found 'object', expected ignored, objects"),
        ('intensity: [5, 5]', 'the first must be below the second'),
        ('intensity: 5', "key 'intensity': found 5"),
        ('submission: rle', "key 'submission': found 'rle', expected keys of its own"),
        ('group: "("', 'not a regular expression'),
        ('- a', 'found list, expected lines of'),
    ],
)
def test_mistake_in_competition_yaml_names_the_file(tmp_path, text, message):
    (tmp_path / 'competition.yaml').write_text(text)
    with pytest.raises(BadInput, match='competition.yaml: .*' + message):
        load_config(write(tmp_path, ''), data_root=tmp_path)


def test_former_name_of_a_key_is_taken(tmp_path):
    assert load_config(write(tmp_path, 'schedule: poly')).lr_schedule == 'poly'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('epoch: 1', "unknown key 'epoch'; did you mean 'epochs'"),
        ('competition: FILE', "key 'competition': found 'FILE', expected keys of its own"),
        ('lr: fast', "key 'lr'.*found 'fast'"),
        ('lr: -1', "key 'lr': found -1, expected a number above 0"),
        ('lr: true', "key 'lr': found True"),
        ('batch_size: 2.5', "key 'batch_size'"),
        ('folds: 1', "key 'folds'"),
        ('crop_size: 100', "key 'crop_size'.*in steps of 32"),
        ('lr: .nan', "key 'lr'"),
        ('scale_range: [2, 1]', 'scale_range'),
        ('class_weights: [1, 2]', 'class_weights: found 2, expected 11'),
        ('optimizer: lamb', "key 'optimizer'.*found 'lamb', expected adamw, "),
        ('name: ../x', "key 'name'"),
        ('loss: {}', "key 'loss'"),
        ('loss: {dise: 1}', "key 'loss': found 'dise', expected .* ce, ohem"),
        ('- 1\n- 2', 'expected lines of'),
        ('a: [1', 'not YAML'),
        ('lr: 1\nlr: 2', "not YAML: key 'lr' stands twice"),
        ('loss: {ce: 1, ce: 2}', "not YAML: key 'ce' stands twice"),
        (
            'lr: !!python/object/apply:os.system [id]',
            r'not YAML: has a tag \(tag:yaml.org,2002:python/object',
        ),
        ('lr: !!int 1', 'not YAML: has a tag'),
        ('lr: !x 1', 'not YAML: has a tag'),
        ('lr: 2001-99-99', 'not YAML: month must be'),
        ('? [a]\n: b', 'not YAML: .*unhashable'),
        ('classes: ' + '[' * 9000, 'not YAML: .*recursion'),
    ],
)
def test_mistake_is_one_line_that_names_the_file(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(BadInput, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(BadInput, match='no such file'):
        load_config(tmp_path / 'none.yaml')


def test_overrides(tmp_path):
    path = write(tmp_path, 'lr: 1e-3\nepochs: 3')
    cfg = load_config(
        path, ['weight_decay=0', 'scale_range=[1, 1.5]', 'loss={ce: 1, dice: 0.5}', 'tta_flips=[h]']
    )
    assert (cfg.lr, cfg.weight_decay, cfg.epochs) == (1e-3, 0, 3)
    assert cfg.scale_range == (1, 1.5) and cfg.loss == {'ce': 1, 'dice': 0.5} and cfg.tta_flips == ('h',)
    with pytest.raises(BadInput, match='expected key=value'):
        load_config(path, ['epochs'])
    with pytest.raises(BadInput, match="did you mean 'epochs'"):
        load_config(path, ['epoch=1'])


def test_dump_round_trips_and_is_frozen(tmp_path):
    cfg = load_config(
        write(tmp_path, 'epochs: 3'), ['folds_csv=a/b.csv', 'class_weights=[1,1,1,1,1,1,1,1,1,1,1]']
    )
    again = make_config(read_yaml(write(tmp_path, dump_config(cfg))), where='x')
    assert again == cfg
    with pytest.raises(ValidationError):
        cfg.epochs = 4


def test_keys_that_may_differ_from_the_trained_run():
    on_resume, in_inference = keys_free_on_resume(), keys_free_in_inference()
    assert {'workers', 'device', 'tta_flips', 'data_root', 'encoder_weights'} <= on_resume < in_inference
    scored = {'compile', 'downsample', 'window', 'pseudo_threshold', 'pseudo_keep', 'pseudo_soft'}
    assert in_inference - on_resume == scored
    assert not {'lr', 'epochs', 'classes', 'encoder', 'name', 'seed', 'cache_size'} & in_inference


def test_loss_terms_are_those_of_losses():
    assert set(get_args(LossTerm)) == set(LOSSES)


@pytest.mark.parametrize('model', [Config, ExtraData, Competition, Submission, Slices])
def test_every_key_has_a_meaning_that_can_be_read_without_the_key(model):
    meanings = read_meanings(model)
    assert meanings.keys() == model.model_fields.keys()
    for key, meaning in meanings.items():
        assert re.match(r'[A-Z].*\.$', meaning, re.DOTALL), key
        assert meaning.split()[0] not in ('Of', 'For', 'In', 'By', 'To'), key


def test_page_of_all_keys_is_up_to_date():
    page = Path(__file__).resolve().parents[1] / 'docs/config.md'
    text = describe_config()
    assert page.read_text() == text, 'python config.py > docs/config.md'
    for key in (Config.model_fields | Competition.model_fields).keys() - {'competition'}:
        assert f'| `{key}` |' in text


def test_a_folder_in_place_of_a_config(tmp_path):
    with pytest.raises(BadInput, match='is a folder, expected a YAML file'):
        load_config(tmp_path)
