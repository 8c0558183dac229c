"""from-sample: what a sample submission tells of the format, what it does not, and what is refused."""

import json
from pathlib import Path

import pytest

from config import Submission, read_competition
from submission import main
from utils.errors import BadInput
from utils.sample_csv import describe_masks
from utils.yaml_files import parse_yaml, replace_keys

NAMES = ['test/a_1.png', 'test/b.png']
MASK = '3 2 9 1'


def make_root(folder: Path, text: str | None = 'classes: [Background, can, cup]\n', names=NAMES) -> Path:
    folder.mkdir(exist_ok=True)
    images = [{'file_name': name, 'height': 4, 'width': 5} for name in names]
    (folder / 'test.json').write_text(json.dumps({'images': images}))
    if text is not None:
        (folder / 'competition.yaml').write_text(text)
    return folder


def from_sample(root: Path, text: str):
    sample = root / 'sample.csv'
    sample.write_text(text)
    assert main(['from-sample', str(sample), '--data', str(root)]) == 0
    return read_competition(root)


SAMPLES = {
    'image, class, mask': (
        'image_id,class,rle\na_1,can,\na_1,cup,\nb,can,\nb,cup,\n',
        {'columns': {'image_id': 'image', 'class': 'class', 'rle': 'mask'}, 'image_names': 'stem'},
    ),
    'ids, names with their ending': (
        'EncodedPixels,ClassId,ImageId\n1 1,1,a_1.png\n1 1,2,a_1.png\n1 1,1,b.png\n1 1,2,b.png\n',
        {'columns': {'EncodedPixels': 'mask', 'ClassId': 'class', 'ImageId': 'image'}, 'image_names': 'name',
         'class_names': 'id'},
    ),
    'paths, from 0, -1': (
        'id,label,mask\ntest/a_1.png,Can,0 2\ntest/a_1.png,Cup,-1\ntest/b.png,Can,-1\ntest/b.png,Cup,-1\n',
        {'columns': {'id': 'image', 'label': 'class', 'mask': 'mask'}, 'first': 0, 'empty': '-1'},
    ),
    'joined': (
        f'ImageId_ClassId,EncodedPixels\na_1_1,{MASK}\na_1_2,\nb_1,{MASK}\nb_2,\n',
        {'columns': {'ImageId_ClassId': 'image_class', 'EncodedPixels': 'mask'}, 'image_names': 'stem',
         'class_names': 'id'},
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', SAMPLES)
def test_what_a_sample_tells(name, tmp_path, capsys):
    text, expected = SAMPLES[name]
    competition = from_sample(make_root(tmp_path / 'r'), text)
    assert competition.submission == Submission(**expected)
    assert competition.score_size == 'own' and competition.classes == ('Background', 'can', 'cup')
    out = capsys.readouterr().out
    path, _, how = out.partition('\n')[0].partition(': run lengths: ')
    assert path == str(tmp_path / 'r/competition.yaml') and expected.items() <= parse_yaml(how, '').items()
    assert 'order: column is usual; write row' in out and 'score_size: own' in out
    assert 'metric: miou is the default' in out and f'next: python prepare.py check --data {tmp_path}' in out
    assert ('first: 1 is usual' in out) == ('from 0' not in name)
    assert ("empty: the sample has none, but masks such as '1 1'" in out) == ('ids, names' in name)


def test_one_row_an_image_and_multilabel(tmp_path):
    text = 'classes: [cell]\ntask: multilabel\n'  # not whole without score_size or submission
    competition = from_sample(make_root(tmp_path / 'r', text), 'id,rle\na_1,1 1\nb,1 1\n')
    assert competition.submission.columns == {'id': 'image', 'rle': 'mask'} and competition.is_multilabel


@pytest.mark.parametrize(('first', 'kind'), [(0, 'id'), (1, 'number')])
def test_classes_that_overlap_counted_from_1(first, kind, tmp_path, capsys):
    root = make_root(tmp_path / 'r', 'classes: [can, cup]\ntask: multilabel\n')
    rows = ''.join(f'{name},{k + first},1 1\n' for name in ('a_1', 'b') for k in range(2))
    assert from_sample(root, 'id,ClassId,rle\n' + rows).submission.class_names == kind
    assert main(['check', str(root / 'sample.csv'), '--data', str(root)]) == 0
    assert 'rows:' not in capsys.readouterr().out


def test_rows_in_another_order_are_told(tmp_path, capsys):
    from_sample(make_root(tmp_path / 'r'), 'id,class,rle\na_1,cup,\na_1,can,\nb,can,\nb,cup,\n')
    expected = 'rows: line 2 is test/a_1.png cup, where test/a_1.png can is written: by test.json, then by'
    assert expected in capsys.readouterr().out


def test_the_sample_passes_the_check_that_it_describes(tmp_path, capsys):
    root = make_root(tmp_path / 'r')
    from_sample(root, SAMPLES['joined'][0])
    assert main(['check', str(root / 'sample.csv'), '--data', str(root)]) == 0
    assert capsys.readouterr().out.endswith('ok\n')


def test_what_the_file_says_is_kept_with_its_comments(tmp_path, capsys):
    text = """# cans and cups
classes: [Background, can, cup]  # by id
metric: dice
score_size: 256  # squares
submission:
  columns: {x: image, y: mask,
    z: class}
  order: row  # the rules say so
  first: 0
  empty: '-1'
# persons
group: '^(p[0-9]+)_'
"""
    root = make_root(tmp_path / 'r', text)
    competition = from_sample(root, SAMPLES['image, class, mask'][0])
    written = (root / 'competition.yaml').read_text()
    assert written.startswith('# cans and cups\nclasses: [Background, can, cup]  # by id\nmetric: dice\n')
    assert written.endswith("# persons\ngroup: '^(p[0-9]+)_'\n")
    assert competition.score_size == 256 and competition.submission.order == 'row'
    assert (competition.submission.first, competition.submission.empty) == (0, '-1')
    assert competition.submission.image_names == 'stem' and competition.group == '^(p[0-9]+)_'
    out = capsys.readouterr().out
    assert 'order:' not in out.partition('\n')[2] and 'score_size' not in out and 'metric' not in out


RUNS = 'submission: {columns: {id: image, c: class, rle: mask}}\n'


@pytest.mark.parametrize(
    'text', [None, *(f'classes: [Background, can, cup]\n{more}' for more in ('score_size: own\n', RUNS))]
)
def test_ids_of_the_home_format(text, tmp_path, capsys):
    root = make_root(tmp_path / 'r', text)
    rows = ''.join(f'{name},{"0 " * 65_535}0\n' for name in NAMES)
    competition = from_sample(root, 'image_id,PredictionString\n' + rows)
    assert competition.rle is None and competition.score_size == 256
    written = parse_yaml((root / 'competition.yaml').read_text(), '')
    assert written['score_size'] == 256 and ('submission' in written) == (text is not None and RUNS in text)
    assert 'a class id for each pixel' in capsys.readouterr().out
    dummy = 'image_id,PredictionString\n' + ''.join(f'{n},0\n' for n in NAMES)
    assert from_sample(make_root(tmp_path / 'dummy', text), dummy).rle is None


FAULTS = {
    'no competition.yaml': (
        'image_id,rle,class\na_1,,Paper\n', None,
        'no such file; .*the classes first: python prepare.py competition --data .*/r$',
    ),
    'other images': ('id,rle\nx,\n', '', r"no column holds test photos, such as .*is 'x,'"),
    'no classes': ('id,rle\na_1,\nb,\n', '', 'has no column of the classes can, cup'),
    'other classes': ('id,class,rle\na_1,mug,\n', '', "the column 'class', with 'mug', is none .*can, cup"),
    'too few classes': ('id,class,rle\na_1,can,\n', '', "has 0 rows of class 'cup'"),
    'a class twice': ('id,class,rle\na_1,can,\na_1,can,\na_1,cup,\n', '', "has 2 rows of class 'can'"),
    'another column': ('id,class,rle,use\na_1,can,,yes\na_1,cup,,\n', '', "'use', with 'yes', is none"),
    'two columns of masks': ('id,class,a,b\na_1,can,,\na_1,cup,,\n', '', "'a', 'b' could each be"),
    'no masks': ('id,class\na_1,can\na_1,cup\n', '', "no column has run lengths; found 'class' with 'can'"),
    'no rows': ('id,rle\n', '', 'has no rows'),
    'empty': ('', '', 'has no rows'),
    'one column': ('id\na_1\n', '', "found 'id', expected the names of the columns"),
    'ids of 512x512': ('id,ids\na_1,' + '0 ' * 262_144 + '\n', '', 'perhaps ids of 512x512 pixels'),
    'ids under another header': ('id,ids\na_1,' + '0 ' * 65_536 + '\n', '', 'ids are written so alone'),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_what_cannot_be_told_is_refused(fault, tmp_path):
    text, settings, message = FAULTS[fault]
    root = make_root(tmp_path / 'r', 'classes: [Background, can, cup]\n' if settings == '' else settings)
    before = sorted((path.name, path.read_bytes()) for path in root.iterdir())
    sample = tmp_path / 'sample.csv'
    sample.write_text(text)
    with pytest.raises(BadInput, match=message) as error:
        main(['from-sample', str(sample), '--data', str(root)])
    assert '\n' not in str(error.value)
    assert sorted((path.name, path.read_bytes()) for path in root.iterdir()) == before


def test_a_root_without_test_photos_is_refused(tmp_path):
    root = make_root(tmp_path / 'r')
    (root / 'test.json').unlink()
    with pytest.raises(BadInput, match=r'test\.json: cannot be read: No such file'):
        from_sample(root, SAMPLES['joined'][0])


TEXTS = [
    '', 'a: 1', 'a: 1\n\n# end\n', '# begin\nb: {x: 1,\n y: 2\n}\na: 1  # one\n', '"b": 1\na: 2\n',
    'b:\n- 1\n- 2\n\n# of a\na: 1\n', '{a: 1, b: 2}\n', 'b: |\n  text\n\n  more\na: 1\n',
]  # fmt: skip


@pytest.mark.parametrize('text', TEXTS)
def test_keys_are_replaced(text):
    values = {'b': {'c': [1, 'é']}, 'd': None}
    changed = replace_keys(text, values)
    assert parse_yaml(changed, '') == (parse_yaml(text, '') or {}) | values
    for comment in ('# end', '# begin', '# one', '# of a'):
        assert (comment in changed) == (comment in text)


@pytest.mark.parametrize(('texts', 'first'), [(['0 0', ''], 1), (['0 3', ''], 0), (['5 1'], 1)])
def test_a_dummy_of_zeros_does_not_count_from_0(texts, first):
    assert describe_masks(texts)[0]['first'] == first
