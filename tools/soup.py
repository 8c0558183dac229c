"""Make a greedy soup: average the weights of several trainings into one model, as far as that scores higher.

    python -m tools.soup output/{a,b}/fold0/best.pt --cfg configs/a.yaml --fold 0 --set name=soup

The checkpoints have the same architecture and start: trainings with other seeds or augmentation, or best.pt
and last.pt of one training. Starting from the best, each one joins if the mean with it scores no less on the
validation photos of the fold (Wortsman et al., arXiv:2203.05482, recipe 1). The BatchNorm statistics of a
mean are computed anew over an epoch of training photos. New statistics alone can raise a score, so each
checkpoint is scored with its own and with new ones too, and a mean is compared with the higher one.

Writes what scored highest, a mean or a single checkpoint, to output/<name>/fold<k>/best.pt for infer.py, and
provenance.yaml, which names its checkpoints.
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

from data.cache import Cache, open_cache
from data.folds import held_out_hash, is_held_out, read_folds, split_fold
from dataset import EpochSampler, TrainingSet, make_loader, normalize
from engine.checkpoint import current_names, load_checkpoint, load_model_state, save_checkpoint
from engine.distributed import Ranks, seed_everything, start_ranks
from engine.inference import autocast, evaluate
from engine.optim import update_bn
from engine.provenance import write_provenance
from engine.runs import check_run, lock_run, open_run, remove_replaced
from metrics import Metric, verdict
from models import SegModel, empty_model, memory_format
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
    held_out = held_out_hash(cache, valid_rows)
    if held_out is None:
        raise BadInput(f'--fold {fold}: has no validation photos to choose a soup on; expected a fold from 0')
    folder = cfg.run_dir(fold)
    states = [read_checkpoint_weights(path, cache, valid_rows) for path in paths]
    require_apart(paths, states, folder)
    model = empty_model(cfg).to(ranks.device, memory_format=memory_format(cfg))
    for path, state in zip(paths, states, strict=True):  # refuse another architecture before a folder is made
        load_model_state(model, state, path)
    start_log(None, quiet=not ranks.is_main)
    with lock_run(folder if ranks.is_main else None, 'making a soup'):
        if ranks.is_main:
            check_run(cfg, fold, resume=False, overwrite=overwrite)
        soup = make_soup(paths, states, FoldScorer(cfg, cache, train_rows, valid_rows, model, ranks))
        if ranks.is_main:
            folder = open_run(cfg, fold, overwrite)
            content = {'model': soup.mean.state, 'score': soup.mean.score, 'fold': fold, 'epoch': -1}
            content |= {'config': cfg.model_dump(mode='json'), 'held_out': held_out}
            content |= {'torch': str(torch.__version__)}
            save_checkpoint(folder / 'best.pt', content)
            remove_replaced(folder)
            write_provenance(folder, cache.coco.fingerprint, ranks.world, soup.paths)
            log.info(f'wrote {folder / "best.pt"}, made of {", ".join(map(str, soup.paths))}')
            config = folder / 'config.yaml'
            log.info(next_line('infer.py', '--cfg', config, '--fold', fold, '--split', 'oof'))
    return soup.mean.score


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

    def score(self, states: list[State], path: Path, renew: bool) -> 'Scored':
        """Score the mean of weights, with new BatchNorm statistics if asked for; `path` names the last."""
        load_model_state(self.model, mean_state(states) if len(states) > 1 else states[0], path)
        if renew:
            renew_norms(self.model, self.cfg, self.cache, self.train_rows, self.ranks)
        counts = evaluate(self.model, self.cache, self.valid_rows, self.cfg, self.ranks)
        state = {key: value.to('cpu', copy=True) for key, value in self.model.state_dict().items()}
        return Scored(state, counts, float(self.metric.score(counts)))

    def score_single(self, state: State, path: Path) -> 'Scored':
        """Score a checkpoint as it is and with new BatchNorm statistics; return and log the better one."""
        single = self.score([state], path, renew=False)
        label = self.metric.label
        log.info(f'{path}: {label} {self.metric.interval(single.counts)}')
        if has_norms(self.model):
            renewed = self.score([state], path, renew=True)
            better = renewed.score > single.score
            outcome = 'taken' if better else 'left out'
            score = self.metric.interval(renewed.counts)
            log.info(f'{path} with new BatchNorm statistics: {label} {score}: {outcome}')
            single = renewed if better else single
        return single


@dataclass(frozen=True)
class Scored:
    """Weights and their score."""

    state: State
    counts: np.ndarray  # (n, 3, K) image_counts
    score: float


@dataclass(frozen=True)
class Soup:
    """The checkpoints in a soup, the best one first, and the scored mean."""

    paths: list[Path]
    mean: Scored


def make_soup(paths: list[Path], states: list[State], scorer: FoldScorer) -> Soup:
    """Score each checkpoint, then add them one by one, the best first, as long as the score does not fall."""
    metric = scorer.metric
    singles = [scorer.score_single(state, path) for state, path in zip(states, paths, strict=True)]
    best, *others = sorted(range(len(paths)), key=lambda n: -singles[n].score)
    chosen, soup = [best], singles[best]
    for n in others:
        mean = scorer.score([states[m] for m in (*chosen, n)], paths[n], renew=True)
        joins = mean.score >= soup.score
        score = f'{metric.label} {metric.interval(mean.counts)}'
        log.info(f'with {paths[n]}: {score}: {"taken" if joins else "left out"}')
        if joins:
            chosen.append(n)
            soup = mean
    score = f'{metric.label} {metric.interval(soup.counts)}'
    log.info(f'soup of {len(chosen)} of {len(paths)}: {score}, chosen on these photos')
    if len(chosen) > 1:
        gain = metric.paired_interval(soup.counts, singles[best].counts)
        log.info(f'the soup against its best checkpoint: {gain.signed}: {verdict(gain, len(soup.counts))}')
    return Soup([paths[n] for n in chosen], soup)


def require_apart(paths: list[Path], states: list[State], folder: Path) -> None:
    """Raise BadInput if a checkpoint lies in the output folder, or two have the same weights."""
    for n, path in enumerate(paths):
        if path.resolve().is_relative_to(folder.resolve()):
            advice = 'give the soup another name: --set name=soup'
            raise BadInput(f'{path}: lies in {folder}, where the soup is to be written; {advice}')
        for m in range(n):
            if same_weights(states[m], states[n]):
                fault = f'{path}: has the weights of {paths[m]}'
                raise BadInput(f'{fault}; their mean gains nothing: leave one of them out')


def same_weights(ours: State, theirs: State) -> bool:
    """Tell whether two models have the same weights; BatchNorm's statistics, which are renewed, aside."""
    statistics = ('.running_mean', '.running_var', '.num_batches_tracked')
    names = [{key for key in state if not key.endswith(statistics)} for state in (ours, theirs)]
    return names[0] == names[1] and all(torch.equal(ours[key], theirs[key]) for key in names[0])


def read_checkpoint_weights(path: Path, cache: Cache, valid_rows: np.ndarray) -> State:
    """Read the weights, or the EMA, of a checkpoint that never saw the validation photos. Raises BadInput."""
    checkpoint = load_checkpoint(path)
    if not is_held_out(checkpoint['held_out'], cache, valid_rows):
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


def has_norms(model: SegModel) -> bool:
    """Tell whether a model has BatchNorm."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def renew_norms(model: SegModel, cfg: Config, cache: Cache, rows: np.ndarray, ranks: Ranks) -> None:
    """Compute the BatchNorm statistics of the model anew over an epoch of training samples."""
    if not has_norms(model):
        return
    sampler = EpochSampler(cfg.batch_size, cfg.seed)
    sampler.set_epoch(0, range(len(rows)))
    loader = make_loader(TrainingSet(cfg, cache, rows, model.fill), cfg.workers, batch_sampler=sampler)
    bar = progress(loader, 'norms', 'batch')
    with autocast(cfg, ranks.device):
        update_bn(model, (normalize(images.to(ranks.device), model.mean, model.std) for images, *_ in bar))


if __name__ == '__main__':
    run_script(command)
