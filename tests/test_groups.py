"""Groups of photos that folds keep together: by a CSV, and what file names say of them."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_set

import prepare
from config import CLASSES, Competition, write_competition
from data.cache import open_cache
from data.folds import read_folds, read_scenes
from data.groups import group_names, suggest_group
from utils.errors import BadInput

NAMES = [f'batch_01/{row:04d}.jpg' for row in range(6)]


@pytest.fixture
def root(tmp_path) -> Path:
    return write_set(tmp_path / 'd', train=6, test=2, side=64)


def write_groups(root: Path, *lines: str, encoding: str = 'utf-8') -> Path:
    (root / 'groups.csv').write_text('\n'.join(lines) + '\n', encoding=encoding)
    return root


@pytest.mark.parametrize('header', ['file_name,group', 'image_id,age,group', 'group;image_id'])
@pytest.mark.parametrize('form', ['{}', './{}', 'name', 'stem'])
def test_groups_of_a_csv(tmp_path, header, form):
    def row(name: str, group: str) -> str:
        name = {'name': Path(name).name, 'stem': Path(name).stem}.get(form, form.format(name))
        fields = {'file_name': name, 'image_id': name, 'age': '7', 'group': group}
        delimiter = ';' if ';' in header else ','
        return delimiter.join(fields[key] for key in header.split(delimiter))

    rows = [row(name, f'patient {int(name[-6:-4]) % 3}') for name in reversed(NAMES)]
    write_groups(tmp_path, header, *rows, row('batch_02/0009.jpg', 'of the test'), encoding='utf-8-sig')
    assert group_names(tmp_path, NAMES, 'groups.csv').tolist() == [0, 1, 2, 0, 1, 2]


FAULTS = {
    'no file': (None, r'groups.csv: No such file or directory \(group in competition.yaml\); expected lines'),
    'no column': (
        ['file_name,patient'],
        "line 1: found the header 'file_name,patient', expected",
    ),
    'no row': ([*(f'{name},a' for name in NAMES[:5])], "lacks the photo 'batch_01/0005.jpg'.*add it"),
    'no group': ([f'{NAMES[0]},'], "line 2: the group of 'batch_01/0000.jpg' is empty"),
    'no name': ([',a'], 'line 2: the file_name is empty'),
    'two groups': (
        [f'{NAMES[0]},a', f'{NAMES[0]},b'],
        "'batch_01/0000.jpg' has the groups 'a' and 'b'",
    ),
    'fields': ([f'{NAMES[0]},a,b,c'], 'line 2: has 4 fields; expected 2'),
}


@pytest.mark.parametrize('case', FAULTS)
def test_bad_rows_are_refused_by_name(tmp_path, case):
    rows, message = FAULTS[case]
    if rows is not None:
        write_groups(tmp_path, *([] if 'patient' in rows[0] else ['file_name,group']), *rows)
    with pytest.raises(BadInput, match=message):
        group_names(tmp_path, NAMES, 'groups.csv')


def test_a_csv_outside_of_the_root_and_names_of_several_photos(tmp_path):
    with pytest.raises(BadInput, match=r'group: \.\./groups.csv leads out of'):
        group_names(tmp_path, NAMES, '../groups.csv')
    write_groups(tmp_path, 'image_id,group', '0000,a')
    with pytest.raises(BadInput, match="'0000' may be several photos; give the file_name, as 'a/0000.jpg'"):
        group_names(tmp_path, ['a/0000.jpg', 'b/0000.jpg'], 'groups.csv')


def test_folds_keep_the_groups_of_a_csv_together(root, tiny, capsys):
    write_groups(root, 'file_name,group', *(f'{name},{row // 2}' for row, name in enumerate(NAMES)))
    competition = Competition(classes=CLASSES, group='groups.csv')
    write_competition(root, competition)
    places = {'data_root': root, 'cache_dir': root.with_name('cache'), 'folds': 3}
    cfg = tiny.model_copy(update={**places, 'competition': competition})
    cache = open_cache(cfg, 'train')
    folds = read_folds(cfg, cache)
    assert (folds[::2] == folds[1::2]).all() and len(set(folds.tolist())) == 3
    assert read_scenes(cfg, cache).tolist() == [0, 0, 1, 1, 2, 2]
    prepare.command(['check', '--data', str(root), '--cfg', 'configs/demo.yaml'])
    assert 'group: 3 scenes of 2 to 2 photos by groups.csv' in capsys.readouterr().out


SHARED = {
    'a numbered patient, video or scene': [f'p/Video{i // 4}-{i:03d}.png' for i in range(20)],
    'a date': [f'IMG_202311{1 + i // 5:02d}_{i:06d}.jpg' for i in range(27)] + ['DSC_1.jpg'],
    'a numbered folder': [f'DCM/P{i // 2:03d}/image{i * 77}.png' for i in range(20)],
    'an original': [f'{"abcdef"[i % 6] * 3}_jpg.rf.{i:032x}.jpg' for i in range(18)],
    'a numbered beginning': [f'tile12x{i // 4}_{i % 4}.png' for i in range(20)],
}


@pytest.mark.parametrize('what', SHARED)
def test_names_that_look_grouped_get_a_line_that_groups_them(what):
    remark = suggest_group(SHARED[what])
    assert f'the names share {what} (' in remark
    pattern = remark.partition("group: '")[2].partition("' into")[0]
    groups = group_names(Path('d'), SHARED[what], Competition(group=pattern).group)
    counts = np.bincount(groups)
    assert f'({len(counts) - pattern.endswith("|$")} of them' in remark and counts.max() > 1


def test_a_drive_in_two_folders_is_one_group():
    names = [f'{("train", "val")[i % 2]}/Seq{i // 8:02d}VD_f{i:05d}.png' for i in range(16)]
    names += [f'{("train", "val")[i % 2]}/00{i // 8:02d}TP_{i:06d}.png' for i in range(32)]
    pattern = suggest_group(names).partition("group: '")[2].partition("' into")[0]
    assert np.bincount(group_names(Path('d'), names, pattern)).tolist() == [8] * 6


@pytest.mark.parametrize(
    'names',
    [
        [f'{i:04d}.jpg' for i in range(300)],
        [f'batch_{i // 20:02d}/{i:06d}.jpg' for i in range(300)],
        [f'train/{i // 20:02d}/{i:06d}.jpg' for i in range(300)],
        [f'IMG_{i}.jpg' for i in range(300)],
        [f'{["can", "bottle", "box", "bag", "cup"][i % 5]}_{i}.png' for i in range(50)],
        [f'{["can", "bottle", "box", "bag", "cup"][i % 5]}/{i}.png' for i in range(50)],
        [f'{i * 7919:032x}.png' for i in range(50)],
        [f'patient_{i}.png' for i in range(50)],
        [f'{i:03d}/image.png' for i in range(50)],
        [f'scan2_{i}.png' for i in range(50)],
        [f'{20190101 + i:012d}.jpg' for i in range(20)],
        ['a.jpg'],
    ],
    ids=lambda names: names[-1],
)
def test_plain_names_are_passed_over(names):
    assert suggest_group(names) == ''


def test_check_says_that_names_look_grouped(root, capsys):
    text = (root / 'train_all.json').read_text()
    for row in range(6):
        (root / f'batch_01/{row:04d}.jpg').rename(root / f'batch_01/id{row // 2}_{row}.jpg')
        text = text.replace(f'{row:04d}.jpg', f'id{row // 2}_{row}.jpg')
    (root / 'train_all.json').write_text(text)
    prepare.command(['check', '--data', str(root)])
    assert "; if one shows the same, write group: '(?i)" in capsys.readouterr().out
