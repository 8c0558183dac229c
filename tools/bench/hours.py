"""Count the hours of a whole competition on one H100: the table of docs/scaling.md."""

from collections.abc import Iterator

from config import load_config
from engine.roofline import H100, count_prediction, count_training
from models import count_model
from tools.bench.fixtures import ROOT

NETWORKS = ('swin_knet', 'convnext', 'convnext_knet', 'beit', 'svt', 'mask2former_swin')
PHOTOS, TEST_PHOTOS, FOLDS = 3272, 819, 5
SCALES, FLIPS = (0.75, 1, 1.25, 1.5), 2
COLUMNS = (
    *('config', 'GMACs', 'TFLOP a step', 'GB a step', 'ms a step', 'of the peak'),
    *('epochs', 'hours a fold', 'five folds', 'prediction'),
)


def hours_table() -> Iterator[str]:
    """Yield the lines of the table in Markdown, and the total."""
    yield f'| {" | ".join(COLUMNS)} |'
    yield '|' + ' --- |' * len(COLUMNS)
    training = prediction = 0.0
    for name in NETWORKS:
        line, fold, minutes = hours_row(name)
        training, prediction = training + FOLDS * fold, prediction + minutes / 60
        yield line
    yield f'| all | | | | | | | | **{training:.0f} h** | {prediction * 60:.0f} min |'
    students = 1 + TEST_PHOTOS / (PHOTOS * (1 - 1 / FOLDS)) / 2
    yield ''
    total = training * (1 + students) + 2 * prediction
    yield f'With `half` pseudo-labels, {students:.2f} times the hours: {total:.0f} GPU-hours in all.'


def hours_row(name: str) -> tuple[str, float, float]:
    """Return the line of a config, the hours of a fold, and the minutes of the predictions of five folds."""
    cfg = load_config(ROOT / 'configs' / f'{name}.yaml')
    step, forward = count_training(cfg), count_prediction(cfg)
    seconds, flops = step.seconds(H100), step.flops
    steps = cfg.epochs * (PHOTOS * (FOLDS - 1) // FOLDS // cfg.batch_size)
    fold = steps * seconds / 3600
    views = FLIPS * sum(scale**2 for scale in SCALES) * (PHOTOS + FOLDS * TEST_PHOTOS)
    minutes = views * forward.seconds(H100) / cfg.infer_batch_size / 60
    gmacs, share = count_model(cfg, cfg.crop_size).macs / 1e9, flops / seconds / H100.flops
    cells = [f'`{name}`', f'{gmacs:,.0f}', f'{flops / 1e12:.1f}', f'{step.bytes / 1e9:.0f}']
    cells += [f'{1000 * seconds:.0f}', f'{100 * share:.0f} %', str(cfg.epochs)]
    cells += [f'{fold:.2f}', f'{FOLDS * fold:.1f}', f'{minutes:.0f} min']
    return f'| {" | ".join(cells)} |', fold, minutes
