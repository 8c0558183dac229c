"""The search for views: it counts as inference does, and chooses without the photos that it is judged on."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import write_set

import infer
import train
from config import Config, load_config
from data.cache import open_cache
from data.folds import read_folds
from engine.inference import make_views
from metrics import Metric
from networks.layers import resize
from tools import search_tta
from utils.errors import BadInput


def views_of(flips: Sequence[str], rotations: Sequence[int], scales: Sequence[float]) -> dict[str, tuple]:
    """The keys of a config with these views."""
    return {'tta_flips': tuple(flips), 'tta_rotations': tuple(rotations), 'tta_scales': tuple(scales)}


def test_every_view_is_turned_back_on_photos_that_are_not_square():
    images = resize(torch.rand(1, 3, 4, 6), (64, 96))
    for view in make_views(('h', 'v', 'hv'), (90, 180, 270), (1.0, 2.0)):
        seen = view.augment_image(images)
        assert max(seen.shape[2:]) in (96, 192)
        back = resize(view.deaugment_mask(seen), (64, 96))
        assert back.shape == images.shape and (back - images).abs().mean() < 0.05


def test_views_that_are_the_same_are_made_once():
    """Three flips and three rotations make 16 views, of which 8 differ."""
    image = torch.rand(1, 3, 32, 32)
    views = make_views(('h', 'v', 'hv'), (90, 180, 270), (1.0, 2.0, 1.0))
    shown = [view.augment_image(image) for view in views]
    assert len(views) == 16 and sum(len(seen[0, 0]) == 32 for seen in shown) == 8
    for i, seen in enumerate(shown):
        assert not any(torch.equal(seen, other) for other in shown[:i])
    assert len(make_views(('hv',), (180,))) == len(make_views(('h', 'h'))) == 2
    assert len(make_views(('h', 'v'), (90,))) == 6  # turned by 90 degrees, v is h and half a turn more
    sets = search_tta.list_sets(Config(**views_of(['h', 'v', 'hv'], [90, 180, 270], [1.0])))
    assert len({view_set.views for view_set in sets}) == len(sets)
    by_words = {str(view_set) for view_set in sets}
    half_turn = 'tta_flips=[] tta_rotations=[180] tta_scales=[1]'
    assert half_turn in by_words and 'tta_flips=[hv] tta_rotations=[] tta_scales=[1]' not in by_words


def test_sets_are_every_choice_in_the_order_of_the_views():
    sets = search_tta.list_sets(Config(**views_of(['h'], [90], [0.75, 1.0])))
    assert len(sets) == 2 * 2 * 3
    every = list(make_views(['h'], [90], [0.75, 1.0]))
    assert len(every) == 8 and max(len(view_set.views) for view_set in sets) == 8
    plain = next(view_set for view_set in sets if view_set.is_plain)
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(every[plain.views[0]].augment_image(image), image)
    assert str(plain) == 'tta_flips=[] tta_rotations=[] tta_scales=[1]'


def test_too_many_sets():
    with pytest.raises(BadInput, match='expected 4,096 at most'):
        search_tta.list_sets(
            Config(**views_of(['h', 'v', 'hv'], [90, 180, 270], [1 + n / 10 for n in range(7)]))
        )


@pytest.mark.parametrize('rule', ['nearest', 'block_max'])
def test_counts_are_those_of_inference(tiny_yaml, tmp_path, capsys, monkeypatch, rule):
    data = write_set(tmp_path / 'small', test=0, side=128)
    (data / 'competition.yaml').write_text('score_size: 64\n')
    places = [f'data_root={data}', f'cache_dir={tmp_path / "cache"}']
    tiny = load_config(tiny_yaml, [*places, f'downsample={rule}', 'cache_size=128'])
    train.main(tiny, 0)
    cfg = tiny.model_copy(update=views_of(['h'], [90], [1.0, 1.5]))
    sets = search_tta.list_sets(cfg)
    monkeypatch.setattr(search_tta, 'read_scenes', lambda *_: np.arange(24) // 8)
    tally = search_tta.count(cfg, 0, sets)
    scenes = np.flatnonzero(read_folds(cfg, open_cache(cfg, 'train')) == 0) // 8
    assert len({*zip(scenes, tally.parts, strict=True)}) == len({*scenes}) == tally.parts.max() + 1 > 1
    for number in (0, 5, len(sets) - 1):
        views = sets[number]
        keys = views_of(views.flips, views.rotations, views.scales)
        score = infer.main(tiny.model_copy(update=keys), 0, 'oof')
        assert float(Metric().score(tally.counts[:, number])) == pytest.approx(score, abs=1e-6)
    assert (tally.seconds > 0).all()
    best = search_tta.main(cfg, 0)
    out = capsys.readouterr().out
    assert '12 sets of views' in out and 'out of sample' in out and best in sets


def test_fewer_photos_than_parts(tiny, tmp_path):
    few = {'data_root': write_set(tmp_path / 'few', 6, 0), 'cache_dir': tmp_path / 'cache'}
    tiny = tiny.model_copy(update=few | views_of(['h'], [], [1.0]))
    train.main(tiny, 0)
    assert search_tta.main(tiny, 0).scales == (1.0,)


@pytest.mark.parametrize('fold', ['-1', '7'])
def test_fold_that_is_none(tiny_yaml, fold):
    with pytest.raises(BadInput, match='no such fold'):
        search_tta.command(['--cfg', str(tiny_yaml), f'--fold={fold}'])


def test_labels_that_the_model_has_seen(tiny):
    train.main(tiny, 0)
    run = tiny.run_dir(0)
    run.rename(run.with_name('fold1'))
    with pytest.raises(BadInput, match='has seen labels of fold 1'):
        search_tta.main(tiny, 1)
