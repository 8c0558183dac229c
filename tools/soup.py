"""Make a greedy soup: average the weights of several trainings into one model, as far as that scores higher.

    python -m tools.soup output/{a,b}/fold0/best.pt --cfg configs/a.yaml --fold 0 --set name=soup

The checkpoints have the same architecture and start: trainings with other seeds or augmentation, or best.pt
and last.pt of one training. Starting from the best, each one joins if the mean with it scores no less on the
validation photos of the fold (Wortsman et al., arXiv:2203.05482, recipe 1). The BatchNorm statistics of a
mean are computed anew over an epoch of training photos.

Writes output/<name>/fold<k>/best.pt for infer.py, and provenance.yaml, which names its checkpoints.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    print('run this as: python -m tools.soup, in the root of the repository', file=sys.stderr)
    sys.exit(2)

from config import Config, load_config
from utils.cli import ArgumentParser, add_config_arguments, next_line, parse_early, run_script
from utils.errors import BadInput


def read_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Read the command line and the config that it names."""
    parser = ArgumentParser(__doc__)
    parser.add_argument('checkpoints', nargs='+', type=Path, metavar='PT', help='two or more, of one fold')
    add_config_arguments(parser)
    parser.add_argument('--fold', type=int, required=True, help='the fold that they were validated on')
    parser.add_argument('--overwrite', action='store_true', help='replace the model that the folder holds')
    args = parser.parse_args(argv)
    if len(args.checkpoints) < 2:
        parser.error('one checkpoint makes no soup: give two or more')
    return args, load_config(args.cfg, args.set)


if __name__ == '__main__':
    parse_early(read_arguments)

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from data.cache import Cache, open_cache
from data.folds import held_out_hash, read_folds, split_fold
from dataset import EpochSampler, TrainingSet, make_loader, normalize
from engine.checkpoint import current_names, load_checkpoint, load_model_state, save_checkpoint
from engine.distributed import Ranks, seed_everything, start_ranks
from engine.inference import autocast, evaluate
from engine.provenance import write_provenance
from engine.runs import check_run, lock_run, open_run
from metrics import Metric, verdict
from models import SegModel
from submission import metric_of
from utils.log import log, start_log
from utils.progress import progress

State = dict[str, Tensor]


def command(argv: list[str] | None = None) -> None:
    args, cfg = read_arguments(argv)
    main(cfg, args.fold, args.checkpoints, args.overwrite)


def main(cfg: Config, fold: int, paths: list[Path], overwrite: bool = False) -> float:
    """Make and write the soup of the checkpoints; return its score. Raises BadInput."""
    ranks = start_ranks(cfg)
    seed_everything(cfg.seed)
    cache = open_cache(cfg, 'train')
    train_rows, valid_rows = split_fold(read_folds(cfg, cache), fold)
    held_out = held_out_hash(cache.names(valid_rows))
    if held_out is None:
        raise BadInput(f'--fold {fold}: has no validation photos to choose a soup on; expected a fold from 0')
    states = [read_checkpoint_weights(path, held_out) for path in paths]
    start_log(None, quiet=not ranks.is_main)
    folder = cfg.run_dir(fold)
    with lock_run(folder if ranks.is_main else None, 'making a soup'):
        if ranks.is_main:
            check_run(cfg, fold, resume=False, overwrite=overwrite)
            if (folder / 'best.pt').exists() and not overwrite:
                raise BadInput(f'{folder}: holds a model already; give another name, or --overwrite')
        model = SegModel(cfg, load_weights=False).to(ranks.device)
        soup = make_soup(paths, states, FoldScorer(cfg, cache, train_rows, valid_rows, model, ranks))
        score = float(metric_of(cfg.competition).score(soup.counts))
        if ranks.is_main:
            folder = open_run(cfg, fold, overwrite)
            content = {'model': soup.state, 'config': cfg.model_dump(mode='json'), 'fold': fold, 'epoch': -1}
            content |= {'score': score, 'held_out': held_out, 'torch': str(torch.__version__)}
            save_checkpoint(folder / 'best.pt', content)
            write_provenance(folder, cache.coco.fingerprint, ranks.world, soup.paths)
            log.info(f'wrote {folder / "best.pt"}, made of {", ".join(map(str, soup.paths))}')
            config = folder / 'config.yaml'
            log.info(next_line('infer.py', '--cfg', config, '--fold', fold, '--split', 'oof'))
    return score


@dataclass(frozen=True)
class FoldScorer:
    """Scores weights on the validation photos of a fold, in one model that takes all of them in turn."""

    cfg: Config
    cache: Cache
    train_rows: np.ndarray
    valid_rows: np.ndarray
    model: SegModel
    ranks: Ranks

    @property
    def metric(self) -> Metric:
        """The competition's."""
        return metric_of(self.cfg.competition)

    def score(self, states: list[State], path: Path) -> np.ndarray:
        """Load weights, of several the mean with new BatchNorm statistics; return their (n, 3, K) counts."""
        load_model_state(self.model, mean_state(states) if len(states) > 1 else states[0], path)
        if len(states) > 1:
            renew_norms(self.model, self.cfg, self.cache, self.train_rows, self.ranks)
        return evaluate(self.model, self.cache, self.valid_rows, self.cfg, self.ranks)


@dataclass(frozen=True)
class Soup:
    """The checkpoints in a soup, the best one first, its weights, and its (n, 3, K) image_counts."""

    paths: list[Path]
    state: State
    counts: np.ndarray


def make_soup(paths: list[Path], states: list[State], scorer: FoldScorer) -> Soup:
    """Score each checkpoint, then add them one by one, the best first, as long as the score does not fall."""
    single_counts, metric = [], scorer.metric
    for path, state in zip(paths, states, strict=True):
        single_counts.append(scorer.score([state], path))
        log.info(f'{path}: {metric.label} {metric.interval(single_counts[-1])}')
    best, *others = sorted(range(len(paths)), key=lambda n: -metric.score(single_counts[n]))
    chosen, state, counts = [best], states[best], single_counts[best]
    for n in others:
        mean_counts = scorer.score([states[m] for m in (*chosen, n)], paths[n])
        joins = metric.score(mean_counts) >= metric.score(counts)
        score = f'{metric.label} {metric.interval(mean_counts)}'
        log.info(f'with {paths[n]}: {score}: {"taken" if joins else "left out"}')
        if joins:
            chosen.append(n)
            counts = mean_counts
            state = {key: value.clone() for key, value in scorer.model.state_dict().items()}
    score = f'{metric.label} {metric.interval(counts)}'
    log.info(f'soup of {len(chosen)} of {len(paths)}: {score}, chosen on these photos')
    if len(chosen) > 1:
        gain = metric.paired_interval(counts, single_counts[best])
        bounds = f'{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]'
        log.info(f'the soup against its best checkpoint: {bounds}: {verdict(gain, len(counts))}')
    return Soup([paths[n] for n in chosen], state, counts)


def read_checkpoint_weights(path: Path, held_out: str) -> State:
    """Read the weights, or the EMA, of a checkpoint that never saw the validation photos. Raises BadInput."""
    checkpoint = load_checkpoint(path)
    if checkpoint['held_out'] != held_out:
        raise BadInput(
            f'{path}: is of another fold, or was trained on validation photos of this one; '
            'expected a checkpoint of --fold'
        )
    return current_names(checkpoint.get('resume', {}).get('ema') or checkpoint['model'])


def mean_state(states: list[State]) -> State:
    """Average the tensors of each name; of whole numbers, which are counters, keep the first."""
    return {
        key: torch.stack([state[key] for state in states]).mean(0) if value.is_floating_point() else value
        for key, value in states[0].items()
    }


def renew_norms(model: SegModel, cfg: Config, cache: Cache, rows: np.ndarray, ranks: Ranks) -> None:
    """Compute the BatchNorm statistics of the model anew over an epoch of training samples."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return
    sampler = EpochSampler(cfg.batch_size, cfg.seed)
    sampler.set_epoch(0, range(len(rows)))
    loader = make_loader(TrainingSet(cfg, cache, rows, model.fill), cfg.workers, batch_sampler=sampler)
    bar = progress(loader, 'norms', 'batch')
    with autocast(cfg, ranks.device):
        update_bn((normalize(images.to(ranks.device), model.mean, model.std) for images, *_ in bar), model)


if __name__ == '__main__':
    run_script(command)
