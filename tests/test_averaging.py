"""Test averages of weights: SWA in training, soups of checkpoints."""

import re
from pathlib import Path

import pytest
import torch

import infer
import train
from data.cache import open_cache
from engine.checkpoint import load_checkpoint
from engine.trainer import PseudoLabels
from tools import soup
from utils.errors import BadInput
from utils.files import file_hash
from utils.yaml_files import read_yaml


def test_swa_is_the_mean_of_the_last_epochs_with_norms_of_its_own(tiny):
    cfg = tiny.model_copy(update={'lr_schedule': 'constant', 'encoder': 'test_resnet.r160_in1k', 'lr': 1e-3})
    train.main(cfg.model_copy(update={'name': 'one'}), -1)
    both = cfg.model_copy(update={'epochs': 2, 'swa': 1.0})
    train.main(both, -1)
    first = load_checkpoint(cfg.output_dir / 'one/all/last.pt')['model']
    second = load_checkpoint(cfg.run_dir(-1) / 'last.pt')['model']
    best = load_checkpoint(cfg.run_dir(-1) / 'best.pt')['model']
    weights = [key for key in best if key.endswith('weight') and best[key].is_floating_point()]
    for key in weights:
        assert torch.allclose(best[key], (first[key] + second[key]) / 2, atol=1e-6), key
    assert any(not torch.equal(first[key], second[key]) for key in weights)
    norms = [key for key in best if key.endswith('running_mean')]
    assert norms and not any(torch.allclose(best[key], second[key]) for key in norms)
    assert 'weights averaged over the last 2 epochs' in (cfg.run_dir(-1) / 'log.txt').read_text()


def test_swa_is_kept_only_where_it_scores_higher(tiny):
    cfg = tiny.model_copy(update={'epochs': 2, 'swa': 0.5})
    best = train.main(cfg, 0)
    lines = (cfg.run_dir(0) / 'log.txt').read_text().splitlines()
    scores = [
        float(line.split('mIoU ')[1].split()[0]) for line in lines if 'epoch' in line and 'mIoU' in line
    ]
    assert len(scores) >= 3 and abs(max(scores) - best) < 1e-4
    assert load_checkpoint(cfg.run_dir(0) / 'best.pt')['score'] == best


def test_pretraining_is_on_pseudo_labels_alone_and_then_on_clean_ones(tiny):
    test = open_cache(tiny, 'test')
    rows = PseudoLabels(test, 'pretrain', None)
    cfg = tiny.model_copy(update={'epochs': 4, 'batch_size': 2})
    train.main(cfg, -1, pseudo=rows)
    log = (cfg.run_dir(-1) / 'log.txt').read_text()
    assert 'epoch 1: training on 6 photos, 6 pseudo-labelled' in log
    assert 'epoch 3: training on 24 photos, 0 pseudo-labelled' in log
    lines = (cfg.run_dir(-1) / 'metrics.csv').read_text().splitlines()[1:]
    rates = [float(line.split(',')[2]) for line in lines]
    assert rates[1] < rates[2] > rates[3]  # the schedule begins again with the clean labels


def damaged(path, name, change):
    """Write a checkpoint beside another with some of its tensors changed."""
    checkpoint = load_checkpoint(path)
    model = {key: change(key, tensor.clone()) for key, tensor in checkpoint['model'].items()}
    torch.save({**checkpoint, 'model': model, 'resume': {}}, path.with_name(name))
    return path.with_name(name)


def test_soup_is_the_mean_of_those_that_help(tiny, capsys):
    base = tiny.model_copy(update={'encoder': 'test_resnet.r160_in1k', 'lr': 1e-3})
    paths = []
    for name, seed in (('one', 0), ('two', 1)):
        cfg = base.model_copy(update={'name': name, 'seed': seed, 'folds_csv': None})
        train.main(cfg, 0)
        paths.append(cfg.run_dir(0) / 'best.pt')
    cfg = base.model_copy(update={'name': 'soup'})
    score = soup.main(cfg, 0, paths)
    output = capsys.readouterr().out
    assert output.count('with new BatchNorm statistics: mIoU') == 2
    assert len(re.findall(r'^with .*: (taken|left out)$', output, re.M)) == 1
    assert 'chosen on these photos' in output
    checkpoint = load_checkpoint(cfg.run_dir(0) / 'best.pt')
    (start,) = read_yaml(cfg.run_dir(0) / 'provenance.yaml')
    assert start['data'] == open_cache(base, 'train').coco.fingerprint
    sources = {f'../../{path.parent.parent.name}/fold0/best.pt': file_hash(path) for path in paths}
    assert start['sources'].items() <= sources.items()
    made_of = output.splitlines()[-2].split(', made of ')[1].split(', ')
    assert {f'../../{Path(path).parent.parent.name}/fold0/best.pt' for path in made_of} == {*start['sources']}
    assert checkpoint['score'] == score >= max(load_checkpoint(path)['score'] for path in paths) - 1e-9
    assert infer.main(cfg, 0, 'oof', tta=False) == pytest.approx(score, abs=1e-9)
    with pytest.raises(BadInput, match='holds'):
        soup.main(cfg, 0, paths)


def test_new_norms_are_not_to_the_credit_of_a_soup(tiny, capsys, monkeypatch):
    """A checkpoint with bad BatchNorm statistics is scored and written with good ones; a mean with itself,
    which has good ones too, gains nothing.
    """
    train.main(tiny, 0)
    path = tiny.run_dir(0) / 'best.pt'
    spoiled = damaged(path, 'spoiled.pt', lambda key, t: t - 1e4 if key.endswith('running_mean') else t)
    made = tiny.model_copy(update={'name': 'soup'})
    for same in ([spoiled, path], [path, path]):
        with pytest.raises(BadInput, match=f'{same[1]}: has the weights of {same[0]}; .* leave one'):
            soup.main(made, 0, same)
    assert not made.run_dir(0).exists()
    battery = 1e4 * (torch.arange(11) == 9)  # everywhere
    wrong = damaged(path, 'wrong.pt', lambda key, t: t + battery if key == 'head.classifier.conv.bias' else t)
    score = soup.main(made, 0, [spoiled, wrong])
    output = capsys.readouterr().out
    assert re.search('spoiled.pt with new BatchNorm statistics: .*: taken', output)
    assert f'soup of 1 of 2: mIoU {score:.4f}' in output
    assert infer.main(made, 0, 'oof', tta=False) == pytest.approx(score, abs=1e-9)
    monkeypatch.setattr(soup, 'require_apart', lambda *_: None)
    assert soup.main(made, 0, [spoiled, spoiled], overwrite=True) == score
    against = 'the soup against its best checkpoint: +0.0000 [+0.0000, +0.0000]: no significant'
    assert against in capsys.readouterr().out


def test_a_checkpoint_in_the_output_folder_is_no_ingredient(tiny):
    train.main(tiny, 0)
    path = tiny.run_dir(0) / 'best.pt'
    other = path.parents[1] / 'other.pt'
    damaged(path, 'noise.pt', lambda _, t: t + 1).rename(other)
    before = path.read_bytes()
    with pytest.raises(BadInput, match=f'{path}: lies in .*--set name=soup'):
        soup.main(tiny, 0, [other, path], overwrite=True)
    assert path.read_bytes() == before


def test_a_refused_soup_leaves_no_folder(tiny):
    train.main(tiny, 0)
    path = tiny.run_dir(0) / 'best.pt'
    other = damaged(path, 'noise.pt', lambda _, t: t + 1)
    wider = tiny.model_copy(update={'name': 'soup', 'head_channels': 24})
    with pytest.raises(BadInput, match='best.pt'):
        soup.main(wider, 0, [path, other])
    assert not wider.run_dir(0).parent.exists()


def test_second_soup_is_refused_while_the_first_is_made(tiny, monkeypatch):
    train.main(tiny, 0)
    path = tiny.run_dir(0) / 'best.pt'
    cfg, paths = (
        tiny.model_copy(update={'name': 'soup'}),
        [path, damaged(path, 'other.pt', lambda _, t: t + 1)],
    )
    make_soup = soup.make_soup

    def make_two_soups(*args):
        monkeypatch.setattr(soup, 'make_soup', make_soup)
        with pytest.raises(BadInput, match='is making a soup here now'):
            soup.main(cfg, 0, paths)
        return make_soup(*args)

    monkeypatch.setattr(soup, 'make_soup', make_two_soups)
    soup.main(cfg, 0, paths)
    assert soup.make_soup is make_soup and (cfg.run_dir(0) / 'best.pt').is_file()


def test_soup_takes_a_checkpoint_of_an_earlier_version(tiny):
    """It kept the auxiliary heads inside the head."""
    cfg = tiny.model_copy(update={'aux_weight': 0.4, 'aux_channels': 8})
    train.main(cfg, 0)
    path = cfg.run_dir(0) / 'best.pt'
    checkpoint = load_checkpoint(path)
    former = {key.replace('aux.', 'head.aux.'): tensor for key, tensor in checkpoint['model'].items()}
    assert former.keys() != checkpoint['model'].keys()
    torch.save(checkpoint | {'model': former}, path.with_name('former.pt'))
    made = cfg.model_copy(update={'name': 'soup'})
    other = damaged(path, 'other.pt', lambda _, t: t + 1)
    soup.main(made, 0, [path.with_name('former.pt'), other])
    assert load_checkpoint(made.run_dir(0) / 'best.pt')['model'].keys() == checkpoint['model'].keys()


def test_mean_of_states():
    states = [{'w': torch.full((2,), float(n)), 'n': torch.tensor(n)} for n in (1, 4)]
    mean = soup.mean_state(states)
    assert mean['w'].tolist() == [2.5, 2.5] and mean['n'] == 1


def test_checkpoint_of_another_fold(tiny):
    train.main(tiny, 1)
    with pytest.raises(BadInput, match='is of another fold, or was trained on'):
        soup.main(tiny.model_copy(update={'name': 'soup'}), 0, [tiny.run_dir(1) / 'best.pt'] * 2)


def test_one_checkpoint_is_no_soup(tiny_yaml, capsys):
    with pytest.raises(SystemExit) as stop:
        soup.command(['a.pt', '--cfg', str(tiny_yaml), '--fold', '0'])
    assert stop.value.code == 2 and 'two or more' in capsys.readouterr().err
