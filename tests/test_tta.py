"""The search for views: it counts as inference does, and chooses without the photos that it is judged on."""

from collections.abc import Sequence

import pytest
import torch
from conftest import write_set

import infer
import train
from config import Config
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
def test_counts_are_those_of_inference(tiny, capsys, rule):
    tiny = tiny.model_copy(update={'downsample': rule, 'cache_size': 512})
    train.main(tiny, 0)
    cfg = tiny.model_copy(update=views_of(['h'], [90], [1.0, 1.5]))
    sets = search_tta.list_sets(cfg)
    tally = search_tta.count(cfg, 0, sets)
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
