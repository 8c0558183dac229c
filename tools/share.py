"""Write a trained model as a folder to share: safetensors, config, classes, and a model card with its scores.

    python -m tools.share output/convnext/fold0 shared/convnext --license cc-by-4.0
    python -m tools.share output/convnext shared/convnext --license mit --data "TACO, www.tacodataset.org"
    hf upload owner/convnext shared/convnext                   # to the Hugging Face hub

    python infer.py --model shared/convnext --image photo.jpg  # or --model owner/convnext
    python train.py --cfg configs/convnext.yaml --fold 0 --set weights=shared/convnext

A run with several folds is shared with all of them. Nothing in the folder runs code, and it has no paths of
this machine. Scores are those of the oof.csv files where all folds have one, else those of the validation.
"""

import argparse
import re
import sys
from pathlib import Path

if not __package__:
    print('run this as: python -m tools.share, in the root of the repository', file=sys.stderr)
    sys.exit(2)

from config import VIEW_KEYS, Config
from engine.hub import (
    SharedModel,
    SharedModels,
    find_models,
    is_shared,
    shared_values,
    weights_name,
    write_facts,
)
from utils.cli import ArgumentParser, next_line, parse_early, run_script
from utils.errors import BadInput, plural
from utils.files import exists, lock, whole_folder, write_text, write_whole


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Raises BadInput."""
    parser = ArgumentParser(__doc__)
    run = 'output/<name>, or the folder of one fold in it'
    parser.add_argument('run', type=Path, metavar='RUN', help=run)
    parser.add_argument('out', type=Path, metavar='DIR', help='folder to make')
    licence = 'licence of the weights by its name on the hub, such as mit, apache-2.0 or cc-by-4.0'
    parser.add_argument('--license', default='unknown', type=licence_name, metavar='NAME', help=licence)
    data = 'what it was trained on, for the card; by default the name of data_root'
    parser.add_argument('--data', metavar='TEXT', help=data)
    args = parser.parse_args(argv)
    if not args.run.is_dir():
        raise BadInput(f'{args.run}: no such folder; expected output/<name>, or the folder of one fold')
    if any(map(is_shared, find_models(args.run).values())):
        raise BadInput(f'{args.run}: is a shared folder; expected the folder of a run')
    refuse_existing(args.out)
    return args


def licence_name(text: str) -> str:
    """Return the name of a licence, if it is like those of the hub."""
    if not re.fullmatch(r'[a-z0-9][a-z0-9.+-]*', text):
        expected = 'expected a name of the hub in lower case, such as mit or cc-by-4.0'
        raise argparse.ArgumentTypeError(f'found {text[:40]!r}, {expected}')
    return text


if __name__ == '__main__':
    parse_early(read_arguments)

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from safetensors.torch import save

from data.coco import read_coco
from data.importers import list_photos
from engine.checkpoint import Run, load_model
from engine.provenance import last_provenance
from engine.runs import UNREADABLE, read_rows
from evaluate import read_fold_confusions
from metrics import LEVEL, Interval
from models import normalisation
from networks.encoders import timm_cfg
from submission import metric_of
from tools.export_onnx import format_classes
from utils.yaml_files import dump_yaml
from voting.origin import list_faults, read_origin

ROUNDING = 1e-5  # of the scores in metrics.csv
METRIC_TYPES = {'miou': 'mean_iou'}  # of the hub, which has no names for the others


@dataclass(frozen=True)
class Scores:
    """Scores for the card: those of all folds, if there are several, and of each one; those of the (K,)
    classes, if known; and what they are.
    """

    rows: list[tuple[str, Interval]]
    by_class: Sequence[float]
    meaning: str


def command(argv: list[str] | None = None) -> None:
    args = read_arguments(argv)
    main(args.run, args.out, args.license, args.data)


def main(source: Path, out: Path, licence: str = 'unknown', data: str | None = None) -> None:
    """Share a run, or a fold of it, as the folder `out`, whole or not at all. Raises BadInput."""
    paths = find_models(source)
    with lock(out.with_name(f'.{out.name}.lock'), 'sharing a run'), whole_folder(out) as folder:
        models, cfg = [], None
        for fold, path in paths.items():
            run = load_model(path, device='cpu')
            facts = facts_of(run, fold)
            if cfg and (key := differing_key(run.cfg, cfg)):
                first = next(iter(paths.values()))
                raise BadInput(f'{path}: was trained with another {key} than {first}; share each fold alone')
            cfg = run.cfg
            models.append(facts)
            write_weights(folder / weights_name(facts.fold, len(paths)), run)
        thresholds = run.thresholds if cfg.competition.is_multilabel else None
        write_facts(folder, cfg, SharedModels(models=models, thresholds=thresholds))
        size = sum(p.numel() for p in run.model.parameters())
        card = model_card(run, models, [*paths.values()], size, out.name, licence, data)
        write_text(folder / 'README.md', card)
        refuse_existing(out)  # another process may have ended meanwhile
    total = sum(path.stat().st_size for path in out.iterdir())
    print(f'wrote {out}: {", ".join(sorted(path.name for path in out.iterdir()))}; {total / 1e6:,.1f} MB')
    print(next_line('infer.py', '--model', out, '--image', example_photo(cfg.data_root)))


def refuse_existing(out: Path) -> None:
    """Raise BadInput if the folder to write exists."""
    if exists(out):
        raise BadInput(f'{out}: exists; give another folder, or remove it')


def example_photo(data: Path) -> Path:
    """Return the first photo of a data set that is there, or else a made-up name."""
    try:
        return list_photos(data)[0]
    except BadInput:
        return Path('photo.jpg')


def write_weights(path: Path, run: Run) -> None:
    """Write the tensors of a model. Raises BadInput, and Interrupted if the disk is full."""
    state = {key: tensor.contiguous().clone() for key, tensor in run.model.state_dict().items()}
    with write_whole(path) as file:
        file.write(save(state, metadata={'format': 'pt'}))


def facts_of(run: Run, fold: int | None) -> SharedModel:
    """Return what is known of a model; its folder, if it is one of a fold, says which."""
    score = None if math.isnan(run.score) else run.score
    fold = run.fold if fold is None else fold
    return SharedModel(fold=fold, epoch=run.epoch, score=score, held_out=run.held_out)


def differing_key(cfg: Config, first: Config) -> str | None:
    """Return the first key that two folds would not share; None if there is none."""
    old, new = ({**shared_values(each), 'competition': each.competition} for each in (first, cfg))
    return next((key for key in new if new[key] != old[key]), None)


# --- scores ---


def find_scores(cfg: Config, models: Sequence[SharedModel], paths: Sequence[Path]) -> Scores:
    """Return the scores out of fold, or else those of the validation."""
    if any(model.held_out is None for model in models):
        return Scores([], (), 'It was trained on every photo, or started from a model that was: no score.')
    csvs = [path.with_name('oof.csv') for path in paths]
    if all(map(exists, csvs)) and not any(list_faults(csvs)):
        try:
            return scores_out_of_fold(cfg, models, csvs)
        except BadInput as error:
            print(f'the card has the scores of the validation: {error}')
    rows = [(name_of(model), validation_score(cfg, model, path)) for model, path in zip(models, paths)]
    return Scores(rows, (), f'On the validation photos of each fold, in one plain view.{chosen(cfg)}')


def scores_out_of_fold(cfg: Config, models: Sequence[SharedModel], csvs: Sequence[Path]) -> Scores:
    """Score oof.csv files. Raises BadInput if one of them or the annotations cannot be read."""
    metric = metric_of(cfg.competition)
    coco = read_coco(cfg.data_root, 'train', cfg.competition)
    counts = [confusions.counts for confusions in read_fold_confusions(csvs, coco)]
    rows = [(name_of(model), metric.interval(each)) for model, each in zip(models, counts, strict=True)]
    together = np.concatenate(counts)
    if len(counts) > 1:
        rows.insert(0, ('all folds', metric.interval(together)))
    origin = read_origin(csvs[0])
    settings = origin.settings if origin else {}
    views = {key: settings[key] for key in (*VIEW_KEYS, 'window') if key in settings}
    shown = ', '.join(f'`{key}: {value}`' for key, value in views.items()) or 'the views of the config'
    meaning = f'Out of fold, on {len(together):,} photos whose labels the model had not seen, with {shown}.'
    return Scores(rows, metric.by_class(together).tolist(), meaning + chosen(cfg))


def chosen(cfg: Config) -> str:
    """Return a sentence on the choice of the epoch, if there was one."""
    sentence = ' The epoch was chosen on the same photos, so that scores are slightly too high.'
    return sentence if cfg.keep == 'best' else ''


def name_of(model: SharedModel) -> str:
    return f'fold {model.fold}'


def validation_score(cfg: Config, model: SharedModel, path: Path) -> Interval:
    """Return a model's score, with the interval of its epoch in metrics.csv if that is of this model."""
    score, name = math.nan if model.score is None else model.score, cfg.competition.metric
    try:
        for row in read_rows(path.with_name('metrics.csv')):
            if row['epoch'] == str(model.epoch) and abs(float(row[name] or 'nan') - score) < ROUNDING:
                return Interval(score, float(row[f'{name}_low']), float(row[f'{name}_high']))
    except UNREADABLE:
        pass  # an earlier version's, or none
    return Interval(score, math.nan, math.nan)


# --- the card ---


def model_card(
    run: Run,
    models: Sequence[SharedModel],
    paths: Sequence[Path],
    size: int,
    name: str,
    licence: str,
    data: str | None,
) -> str:
    """Write the model card in Markdown, with the header that the hub reads."""
    cfg, scores = run.cfg, find_scores(run.cfg, models, paths)
    data = data or cfg.data_root.name
    several = (
        f' The {len(models)} models of its folds are here; infer.py averages them.' if models[1:] else ''
    )
    task = 'A pixel has one class.'
    if cfg.competition.is_multilabel:
        task = 'Classes may overlap: each has a mask of its own, from its threshold on.'
    return f"""---
{dump_yaml(card_header(cfg, scores, licence, data))}---

# {cfg.name}

Semantic segmentation of photos into {len(cfg.classes)} classes: {cfg.head} over {cfg.encoder},
{size / 1e6:.1f} million parameters.{several}

## Use

In the repository that trained it; `{name}` is this folder, or `owner/{name}` on the hub.

```bash
python infer.py --model {name} --image photo.jpg
python infer.py --model {name} --split test --set data_root=DIR
python train.py --cfg CONFIG --fold 0 --set weights={name}
```

```python
{example(cfg, name, models)}
```

The weights are safetensors, and no file here runs code.

## Classes

{task}

{format_classes(cfg, run.thresholds)}

## Photos

{describe_photos(cfg)}

## Scores

{format_scores(cfg, scores)}

## Training

{describe_training(cfg, paths)}

Data: {data}. Licence of the weights: {licence}{' (ask its authors)' if licence == 'unknown' else ''}.

## Limits

Every photo gets classes of those above, also one unlike the photos that it was trained on.
Scores on other photos may be lower.
"""


def card_header(cfg: Config, scores: Scores, licence: str, data: str) -> dict:
    """Return the metadata of the card, by the keys of the Hugging Face hub."""
    metric = metric_of(cfg.competition)
    head = cfg.head.removeprefix('smp-')
    tags = ['semantic-segmentation', 'image-segmentation', 'pytorch', 'safetensors', 'timm', head]
    header = {'license': licence, 'pipeline_tag': 'image-segmentation', 'tags': tags}
    published = timm_cfg(cfg.encoder)
    if cfg.encoder_weights == 'timm' and published and published.hf_hub_id:
        header['base_model'] = published.hf_hub_id
    if scores.rows:
        _, score = scores.rows[0]
        kind = METRIC_TYPES.get(metric.name, metric.name)
        value = {'type': kind, 'name': metric.label, 'value': round(score.value, 4)}
        dataset = {'name': data, 'type': re.sub(r'[^a-z0-9]+', '-', data.lower()).strip('-') or 'other'}
        result = {'task': {'type': 'image-segmentation'}, 'dataset': dataset, 'metrics': [value]}
        header['metrics'] = [kind]
        header['model-index'] = [{'name': cfg.name, 'results': [result]}]
    return header


def example(cfg: Config, name: str, models: Sequence[SharedModel]) -> str:
    """Return the Python lines of the card that predict a photo."""
    fold = f', fold={models[0].fold}' if len(models) > 1 else ''
    bands, depth = cfg.competition.channels, cfg.competition.depth
    load, read = 'import numpy as np\n', "np.load('photo.npy')"
    if cfg.competition.is_rgb:
        load, read = (
            'import numpy as np\nfrom PIL import Image\n',
            "np.asarray(Image.open('photo.jpg').convert('RGB'))",
        )
    mask = 'planes (K, H, W) of' if cfg.competition.is_multilabel else '(H, W) ids of'
    return f"""{load}
from engine.checkpoint import load_model
from engine.inference import photo_mask

run = load_model('{name}'{fold})
photo = {read}  # (H, W, {bands}) uint{depth}
mask = photo_mask(run, photo)  # {mask} run.cfg.classes"""


def describe_photos(cfg: Config) -> str:
    """Return the table of the card on what a photo is to the model."""
    competition, (mean, std) = cfg.competition, normalisation(cfg)
    bands = 'RGB' if competition.is_rgb else f'{competition.channels} bands'
    rows = {
        'bands': f'{bands} of {competition.depth} bits, turned as {competition.orientation}',
        'size': f'longer side {cfg.image_size or cfg.cache_size or "as it is"} at scale 1, its aspect kept',
        'mean, of values 0 to 1': ', '.join(f'{value:.4g}' for value in mean),
        'standard deviation': ', '.join(f'{value:.4g}' for value in std),
        'views of test-time augmentation': f'flips {[*cfg.tta_flips]}, rotations {[*cfg.tta_rotations]}, '
        f'scales {[*cfg.tta_scales]}',
        'window': cfg.window or 'none',
    }
    return '\n'.join(['| | |', '| --- | --- |', *(f'| {key} | {value} |' for key, value in rows.items())])


def format_scores(cfg: Config, scores: Scores) -> str:
    """Return the tables of the card of the scores, and of those of the classes."""
    if not scores.rows:
        return scores.meaning
    metric = metric_of(cfg.competition)
    lines = [
        scores.meaning,
        '',
        f'| | {metric.label} | {LEVEL:.0%} bootstrap interval |',
        '| --- | --- | --- |',
    ]
    for name, score in scores.rows:
        bounds = '-' if math.isnan(score.low) else f'{score.low:.4f} to {score.high:.4f}'
        lines.append(f'| {name} | {score.value:.4f} | {bounds} |')
    if len(scores.by_class):
        lines += ['', f'| class | {metric.class_label} |', '| --- | --- |']
        pairs = zip(cfg.classes, scores.by_class, strict=True)
        lines += [f'| {name} | {"-" if math.isnan(value) else f"{value:.4f}"} |' for name, value in pairs]
    return '\n'.join(lines)


def describe_training(cfg: Config, paths: Sequence[Path]) -> str:
    """Return the sentences of the card on the training."""
    entry = last_provenance(paths[0].parent) or {}
    versions = entry.get('versions') or {}
    start = f'encoder_weights: {shared_values(cfg)["encoder_weights"]}'
    if cfg.weights:
        start = f'weights: {cfg.weights.name}'
    extra = ''.join(f', {each.share:.0%} of the samples from {each.root.name}' for each in cfg.extra_data)
    packages = ', '.join(f'{key} {versions[key]}' for key in ('torch', 'timm') if key in versions)
    changed = ' with changes' if entry.get('changed') else ''
    commit = str(entry.get('commit', 'unknown'))[:12]
    crops = f'{cfg.batch_size} crops of {cfg.crop_size} pixels'
    return f"""{plural(cfg.epochs, 'epoch')} in batches of {crops}, from `{start}`{extra};
seed {cfg.seed}. On {entry.get('hardware', 'unknown hardware')}, with {packages or 'unknown versions'},
commit {commit}{changed}. config.yaml has every setting."""


if __name__ == '__main__':
    run_script(command)
