"""A greedy soup: one model whose weights are the mean of several trainings', as far as that scores higher.

    python -m tools.soup output/{a,b}/fold0/best.pt --cfg configs/a.yaml --fold 0 --set name=soup

Checkpoints are of one architecture and start: trainings with other seeds or augmentation, or best.pt and
last.pt of one. From the best on, each joins where the mean with it scores no less on the fold's validation
photos (Wortsman et al., arXiv:2203.05482, recipe 1). BatchNorm statistics of a mean are taken anew over an
epoch of training photos. Writes output/<name>/fold<k>/best.pt, for infer.py, and provenance.yaml, which
names what it was made of; it costs at test time what one model costs.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from config import Config, load_config
from data.cache import Cache, open_cache
from data.folds import held_out_hash, read_folds, split_fold
from dataset import EpochSampler, TrainingSet, make_loader, normalize
from engine.checkpoint import load_checkpoint, load_model_state, save_checkpoint
from engine.distributed import Ranks, seed_everything, start_ranks
from engine.inference import autocast, evaluate
from engine.provenance import write_provenance
from engine.runs import check_run, lock_run, open_run
from metrics import interval, paired_interval, verdict
from models import SegModel
from utils.cli import ArgumentParser, add_config_arguments, next_line, run_script
from utils.errors import BadInput
from utils.log import log, start_log
from utils.progress import progress

State = dict[str, Tensor]


def main(cfg: Config, fold: int, paths: list[Path], overwrite: bool = False) -> float:
    """Writes the soup of the checkpoints, and returns its mIoU. Raises BadInput."""
    ranks = start_ranks(cfg)
    seed_everything(cfg.seed)
    cache = open_cache(cfg, 'train')
    train_rows, valid_rows = split_fold(read_folds(cfg, cache), fold)
    held_out = held_out_hash(cache.names(valid_rows))
    if held_out is None:
        raise BadInput(f'--fold {fold}: has no validation photos, on which a soup is chosen')
    states = [read_checkpoint_weights(path, held_out) for path in paths]
    start_log(None, quiet=not ranks.is_main)
    with lock_run(cfg.run_dir(fold) if ranks.is_main else None, 'making a soup'):
        if ranks.is_main:
            check_run(cfg, fold, resume=False, overwrite=overwrite)
            if (cfg.run_dir(fold) / 'best.pt').exists() and not overwrite:
                raise BadInput(
                    f'{cfg.run_dir(fold)}: holds a model already; give another name, or --overwrite'
                )
        chosen, soup, counts = choose(cfg, cache, train_rows, valid_rows, paths, states, ranks)
        score = interval(counts).value
        if ranks.is_main:
            folder = open_run(cfg, fold, overwrite)
            content = {'model': soup, 'config': cfg.model_dump(mode='json'), 'fold': fold, 'epoch': -1}
            content |= {'score': score, 'held_out': held_out, 'torch': str(torch.__version__)}
            save_checkpoint(folder / 'best.pt', content)
            write_provenance(folder, cache.coco.fingerprint, ranks.world, chosen)
            log.info(f'wrote {folder / "best.pt"}, of {", ".join(map(str, chosen))}')
            config = folder / 'config.yaml'
            log.info(next_line('infer.py', '--cfg', config, '--fold', fold, '--split', 'oof'))
    return score


def choose(
    cfg: Config,
    cache: Cache,
    train_rows: np.ndarray,
    valid_rows: np.ndarray,
    paths: list[Path],
    states: list[State],
    ranks: Ranks,
) -> tuple[list[Path], State, np.ndarray]:
    """The checkpoints that are in the soup, the best first, its weights, and its (n, 3, K) counts."""
    model = SegModel(cfg, load_weights=False).to(ranks.device)

    def counts_of(state: State, path: Path, mixed: bool) -> np.ndarray:
        load_model_state(model, state, path)
        if mixed:
            renew_norms(model, cfg, cache, train_rows, ranks)
        return evaluate(model, cache, valid_rows, cfg, ranks)

    alone = []
    for path, state in zip(paths, states, strict=True):
        alone.append(counts_of(state, path, mixed=False))
        log.info(f'{path}: mIoU {interval(alone[-1])}')
    order = sorted(range(len(paths)), key=lambda n: -interval(alone[n]).value)
    chosen, best = [order[0]], alone[order[0]]
    soup = states[order[0]]
    for n in order[1:]:
        mean = mean_state([states[m] for m in (*chosen, n)])
        counts = counts_of(mean, paths[n], mixed=True)
        joins = interval(counts).value >= interval(best).value
        log.info(f'with {paths[n]}: mIoU {interval(counts)}: {"taken" if joins else "left out"}')
        if joins:
            chosen.append(n)
            best, soup = counts, {key: value.clone() for key, value in model.state_dict().items()}
    gain = paired_interval(best, alone[order[0]])
    log.info(f'soup of {len(chosen)} of {len(paths)}: mIoU {interval(best)}, chosen on these photos')
    if len(chosen) > 1:
        shown = f'{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]'
        log.info(f'the soup against its best member: {shown}: {verdict(gain, len(best))}')
    return [paths[n] for n in chosen], soup, best


def read_checkpoint_weights(path: Path, held_out: str) -> State:
    """The weights of a checkpoint that never saw the labels of the fold; of a last.pt its EMA, where it has
    one. Raises BadInput.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint['held_out'] != held_out:
        raise BadInput(f'{path}: has seen labels of the fold, or is of another one')
    average = checkpoint.get('resume', {}).get('ema')
    return average or checkpoint['model']


def mean_state(states: list[State]) -> State:
    """The mean of tensors of one name; of whole numbers, counters, the first."""
    return {
        key: torch.stack([state[key] for state in states]).mean(0) if value.is_floating_point() else value
        for key, value in states[0].items()
    }


def renew_norms(model: SegModel, cfg: Config, cache: Cache, rows: np.ndarray, ranks: Ranks) -> None:
    """BatchNorm statistics of the model's own, over an epoch of training samples."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return
    sampler = EpochSampler(cfg.batch_size, cfg.seed)
    sampler.set_epoch(0, range(len(rows)))
    loader = make_loader(TrainingSet(cfg, cache, rows, model.fill), cfg.workers, batch_sampler=sampler)
    bar = progress(loader, 'norms', 'batch')
    with autocast(cfg, ranks.device):
        update_bn((normalize(images.to(ranks.device), model.mean, model.std) for images, *_ in bar), model)


def command(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__, prog='python -m tools.soup')
    parser.add_argument('checkpoints', nargs='+', type=Path, metavar='PT', help='two or more, of one fold')
    add_config_arguments(parser)
    parser.add_argument('--fold', type=int, required=True, help='the fold that they were validated on')
    parser.add_argument('--overwrite', action='store_true', help='where the folder of the soup holds a model')
    args = parser.parse_args(argv)
    if len(args.checkpoints) < 2:
        parser.error('one checkpoint is no soup: give two or more')
    main(load_config(args.cfg, args.set), args.fold, args.checkpoints, args.overwrite)


if __name__ == '__main__':
    run_script(command)
