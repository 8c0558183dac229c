"""Plans of configs: the fingerprint, the rules with a machine that says what it is asked, and the counts."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY, write_rectangles

import engine.machine
import prepare
from config import CLASSES, HOME, Competition, load_config, make_config
from data.coco import read_coco
from data.plan import GB, LINES, Budget, Fingerprint, StepCost, make_plan, read_fingerprint
from engine.machine import Device, count_step, run_steps
from utils.errors import BadInput
from utils.yaml_files import parse_yaml

SET = Fingerprint(HOME, 288, 193, 512, 512, 512, 155, (0.6, *[0.04] * 10), (0, *[50] * 10))
MULTIMACS = {'xlarge': 535, 'large': 300, 'base': 150, 'tiny': 60, 'lite2': 6.2, 'lite0': 5.2}  # at 512


class FakeMachine:
    """A device whose speed and memory are given; a photo of 512x512 of a network takes its GMACs / speed."""

    origin = 'made up'

    def __init__(
        self, device: str = 'cpu', speed: float = 30, photo_gb: float = 0.5, real: float = 0
    ) -> None:
        self.device, self.speed, self.photo, self.real = device, speed, photo_gb * GB, real
        self.weights = ('lite', 'convnext')

    def cost(self, values):
        macs = next(macs for name, macs in MULTIMACS.items() if name in values['encoder'])
        area = values['crop_size'] ** 2 / 512**2
        return StepCost(3 * macs * area / self.speed, 0.1 * GB, self.photo * area)

    def has_weights(self, values):
        return any(name in values['encoder'] for name in self.weights)

    def measure(self, values):
        return (self.cost(values).seconds, self.real * GB * values['batch_size']) if self.real else None


def plan(found: Fingerprint = SET, machine: FakeMachine | None = None, **budget) -> dict:
    """Make a plan, load it as a config does, and return its values."""
    machine = machine or FakeMachine()
    text = make_plan(found, Budget(**{'memory': 8, 'hours': 1.5, **budget}), machine).text()
    lines = text.splitlines()
    assert len(lines) <= LINES and all('  # ' in line for line in lines[1:]) and lines[0].startswith('# ')
    values = parse_yaml(text, 'plan')
    make_config({**values, 'competition': found.competition}, 'plan')
    return values


def with_competition(**values) -> Fingerprint:
    return replace(SET, competition=Competition(**values))


def test_the_small_set_gets_what_its_recipe_has():
    recipe = load_config('configs/trash481.yaml')
    values = plan(replace(SET, presence=(0, *[29] * 10)))
    same = (
        'encoder',
        'probe',
        'encoder_weights',
        'head_channels',
        'aux_weight',
        'image_size',
        'crop_size',
        'loss',
        'ema',
    )
    for key in (*same, 'batch_size', 'lr', 'tta_flips', 'scale_range'):
        found = values[key]
        assert (tuple(found) if isinstance(found, list) else found) == getattr(recipe, key), key
    assert 0.9 * recipe.epochs <= values['epochs'] <= 2 * recipe.epochs


def test_fingerprint_of_the_records(tmp_path):
    boxes = {f'{i}.png': (0, 0, 10, 10, 1) for i in range(9)} | {'9.png': (0, 0, 40, 10, 2)}
    write_rectangles(tmp_path / 'd', 50, 100, boxes)
    found = read_fingerprint(read_coco(tmp_path / 'd', 'train', HOME), 3)
    assert (found.photos, found.test_photos, found.height, found.width, found.longest) == (
        10,
        3,
        50,
        100,
        100,
    )
    assert found.small_object == pytest.approx(10) and found.presence[1:3] == (9, 1)
    assert found.shares[1:3] == pytest.approx((900 / 50_000, 400 / 50_000))
    assert 'from General trash in 9 photos to Paper in 1 photo' in found.describe()[2]


def test_hours_choose_the_size_then_the_network_and_the_epochs():
    slow, fast = FakeMachine(speed=9), FakeMachine(speed=2000)
    assert plan(machine=slow)['encoder'] == 'tf_efficientnet_lite0'
    assert plan(machine=fast)['epochs'] == 100
    gpu = {'machine': FakeMachine('cuda', speed=16_000), 'memory': 24}
    values = plan(**gpu, hours=8)
    assert values['encoder'] == 'convnext_xlarge.fb_in22k' and values['drop_path'] == 0.4
    assert values.get('image_size', 512) == 512 and values['batch_size'] == 8
    assert plan(**gpu, hours=0.3)['encoder'] == 'convnext_base.fb_in22k'
    large = replace(SET, height=2000, width=2000, longest=2000, competition=Competition(score_size='own'))
    sizes = [
        plan(large, FakeMachine('cuda', 16_000), memory=80, hours=h)['image_size'] for h in (0.1, 2, 500)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2] == 1984


def test_epochs_fill_the_hours():
    machine, values = FakeMachine(), plan(replace(SET, test_photos=4000))
    seconds, hours = machine.cost(values).seconds, 0.85 * 1.5 * 3600
    epoch = 5 * 230 * seconds + 288 * seconds / 3
    used = epoch * values['epochs'] + 2 * (288 + 5 * 4000) * seconds / 3  # a flip doubles the prediction
    assert used <= hours < used + epoch


def test_too_few_hours_are_said_and_planned_for_all_the_same():
    made = make_plan(SET, Budget(8, 0.1), FakeMachine(speed=5))
    assert (
        '0.1 hours are enough for 1 epoch of each fold, expected 18 or more; give more hours' in made.notes[1]
    )
    assert 'epochs: 1 ' in made.text()


def test_memory_chooses_the_batch_and_then_the_crop():
    small = plan(memory=4, machine=FakeMachine(speed=2000, photo_gb=1.6))  # .4 GB a photo at 256
    assert (small['batch_size'], small['accumulate'], small['lr']) == (4, 4, 1e-3)
    gpu = FakeMachine('cuda', 16_000, photo_gb=4)
    tight = plan(memory=8, hours=8, machine=gpu)
    assert tight['crop_size'] < 512 and tight['batch_size'] == 2
    with pytest.raises(BadInput, match='--memory 1.2: found too little for a step of two photos'):
        plan(memory=1.2)


def test_real_steps_that_take_more_halve_the_batch():
    values = plan(machine=FakeMachine(speed=2000, real=0.6))
    assert (values['batch_size'], values['accumulate']) == (8, 2)
    with pytest.raises(BadInput, match='a step of two photos took 8.0 GB; expected more'):
        plan(machine=FakeMachine(real=4))


def test_few_photos_get_a_small_batch_and_more_epochs():
    values = plan(replace(SET, photos=30, height=512, width=512), hours=8)
    assert values['batch_size'] == 2 and values['epochs'] > 150
    assert values['lr'] == pytest.approx(1e-3 * math.sqrt(2 / 16), rel=0.05)


@pytest.mark.parametrize(
    ('competition', 'loss'),
    [
        ({}, {'ce': 1, 'lovasz': 1}),
        ({'metric': 'image_miou'}, {'ce': 1, 'lovasz': 1}),
        ({'metric': 'dice', 'score_size': 'own'}, {'ce': 1, 'dice': 1}),
        (
            {'metric': 'image_dice', 'task': 'multilabel', 'score_size': 'own', 'classes': ['a', 'b']},
            {'bce': 1, 'dice': 1},
        ),
    ],
    ids=['miou', 'image_miou', 'dice', 'multilabel'],
)
def test_loss_by_task_and_metric(competition, loss):
    found = with_competition(**competition)
    count = len(found.competition.classes)
    assert plan(replace(found, shares=(0.1,) * count, presence=(50,) * count))['loss'] == loss


def test_flips_by_whether_they_are_harmless():
    assert plan()['tta_flips'] == ['h'] and 'vflip' not in plan()
    above = plan(no_up=True)
    assert (above['vflip'], above['rot90'], above['tta_flips']) == (0.5, 0.5, ['h', 'v', 'hv'])
    sided = plan(with_competition(classes=['Background', 'left lung', 'right lung', *CLASSES[3:]]))
    assert sided['hflip'] == 0 and 'tta_flips' not in sided


def test_rare_classes_and_sparse_crops():
    assert 'balance' not in plan()
    assert plan(replace(SET, presence=(0, 250, 3, *[40] * 8)))['balance'] == 0.5
    own = Competition(score_size='own')
    sparse = replace(SET, height=3000, width=3000, longest=3000, small_object=30, competition=own)
    values = plan(
        replace(sparse, shares=(0.99, *[0.001] * 10)), FakeMachine('cuda', 9e6), memory=24, hours=50
    )
    assert values['crop_balance'] == 0.33 and values['window'] == values['crop_size'] == 1024
    assert values['image_size'] == 3008 and values['cache_size'] == 0 and values['infer_batch_size'] < 16


def test_few_photos_of_one_object_get_a_probe():
    one = replace(SET, presence=(0, *[29] * 10))
    assert plan(one)['probe'] == 1
    assert 'probe' not in plan(replace(one, photos=1001, presence=(0, *[100] * 10)))
    assert 'probe' not in plan(replace(one, presence=(0, *[50] * 10)))  # 1.7 a photo
    machine = FakeMachine()
    machine.weights = ()
    assert 'probe' not in plan(one, machine=machine)


def test_aspect_gives_a_crop_of_the_photos_area_and_other_scores_their_cache():
    wide = replace(SET, height=256, width=1024, longest=1024, competition=Competition(score_size='own'))
    values = plan(wide, FakeMachine(speed=2000), hours=9)
    assert (values['image_size'], values['crop_size'], values['cache_size']) == (1024, 512, 0)
    assert plan(with_competition(score_size=320, submission={}))['cache_size'] == 640


def test_weights_that_are_not_here():
    machine = FakeMachine()
    machine.weights = ('lite0',)
    assert plan(machine=machine)['encoder'] == 'tf_efficientnet_lite0'
    machine.weights = ()
    assert plan(machine=machine)['encoder_weights'] == 'none'
    gpu = FakeMachine('cuda', 16_000)
    gpu.weights = ('tiny',)
    assert plan(machine=gpu, memory=24)['encoder'] == 'convnext_tiny.fb_in22k'
    gpu.weights = ()
    made = make_plan(SET, Budget(24, 8), gpu)
    assert 'xlarge' in made.text() and 'timm fetches its weights' in made.text()


# --- the counts that engine.machine makes ----------------------------------------------------------------


@pytest.fixture
def network():
    return make_config({**TINY, 'image_size': 64, 'batch_size': 4}, 'test')


def test_saved_bytes_are_those_that_autograd_keeps(network):
    _, parameters, saved = count_step(network, torch.float32)
    _, _, halved = count_step(network, torch.bfloat16)
    maps = 2 * 16 * 4 * 11 * 256**2
    assert 0.4 * (saved - maps) < halved - maps < 0.8 * (saved - maps) and parameters > 1e5


@pytest.mark.parametrize(
    'competition',
    [{}, {'task': 'multilabel', 'classes': ['a', 'b'], 'score_size': 'own', 'channels': 6}],
    ids=['multiclass', 'multilabel'],
)
def test_steps_of_each_task_are_run(network, competition):
    loss = {'bce': 1, 'dice': 1} if competition else {'ce': 1, 'lovasz': 1}
    update = {'competition': Competition(**competition), 'loss': loss}
    seconds, peak = run_steps(network.model_copy(update=update))
    assert 0 < seconds < 5 and peak > 0.1 * GB


def test_an_absent_gpu_is_assumed(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    device = Device('cuda', 24, HOME)
    assert 'RTX 3090' in device.origin and device.measure({}) is None
    values = {'encoder': 'convnext_tiny.fb_in22k', 'crop_size': 512}
    cost, quarter = device.cost(values), device.cost({**values, 'crop_size': 256})
    assert cost.state == quarter.state == pytest.approx(60.1e6 * 16, rel=0.01)
    assert cost.photo == 4 * quarter.photo and 3.5 < cost.seconds / quarter.seconds < 4  # one update of both
    share = 3 * 2 * device.counts[values['encoder']][0] / quarter.seconds / 71e12
    assert 0.3 < share < 0.8  # of the data sheet's FLOP/s
    assert 0.4 * GB < cost.photo < 1.5 * GB  # of a ConvNeXt-T with UPerNet, in bf16
    assert not device.has_weights(values)
    assert device.has_weights({'encoder': 'tf_efficientnet_lite0', 'encoder_weights': 'efficientnet-lite0'})


# --- prepare.py plan -------------------------------------------------------------------------------------


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(engine.machine, 'Device', lambda device, memory, competition: FakeMachine(device))


def test_command_writes_a_config_that_loads(shapes, tmp_path, capsys, monkeypatch, made_up):
    monkeypatch.chdir(tmp_path)
    words = ['plan', '--data', str(shapes), '--memory', '8', '--hours', '1', '--device', 'cpu']
    prepare.command(words)
    printed = capsys.readouterr().out
    cfg = load_config('configs/shapes.yaml', data_root=shapes)
    assert cfg.name == 'shapes' and cfg.encoder_weights.startswith('efficientnet-lite')
    assert printed.splitlines()[0].startswith('24 training photos, 6 of the test; the median')
    assert '--dry-run --cfg configs/shapes.yaml' in printed.splitlines()[-1]
    before = (tmp_path / 'configs/shapes.yaml').read_bytes()
    with pytest.raises(BadInput, match=r'configs/shapes.yaml: exists; give another --name or --out'):
        prepare.command([*words, '--hours', '9'])
    assert (tmp_path / 'configs/shapes.yaml').read_bytes() == before
    prepare.command([*words, '--overwrite', '--hours', '9', '--name', 'mine', '--out', 'a/b.yaml'])
    assert load_config('a/b.yaml').name == 'mine'


@pytest.mark.parametrize('hours', ['0', '-1', 'nan', 'inf', 'eight'])
def test_hours_that_are_none(hours, capsys):
    with pytest.raises(SystemExit):
        prepare.command(['plan', '--data', 'd', '--memory', '8', '--hours', hours])
    assert 'expected a number above 0' in capsys.readouterr().err


def test_data_that_cannot_be_read(tmp_path, made_up):
    words = ['plan', '--data', str(tmp_path), '--memory', '8', '--hours', '1']
    with pytest.raises(BadInput, match='has no annotations'):
        prepare.command(words)


@pytest.mark.slow
def test_trash481_gets_a_recipe_on_this_machine(trash481, tmp_path):
    out = tmp_path / 'mine.yaml'
    words = ['--memory', '8', '--hours', '1.5', '--device', 'cpu', '--out', str(out)]
    prepare.command(['plan', '--data', str(trash481), *words])
    cfg = load_config(out, data_root=trash481)
    assert cfg.encoder.startswith('tf_efficientnet_lite') and cfg.image_size >= 256
