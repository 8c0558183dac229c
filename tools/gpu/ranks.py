"""Item 5: two ranks on one GPU train as one process does, and so does one rank of NCCL.

NCCL takes one rank a GPU, so two ranks use gloo, with tensors on the GPU. Each gets its part of the same
batches. No pixel is ignored, so the mean of the ranks' losses is the loss of the batch.
"""

import json
import multiprocessing
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import torch
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from config import Config
from engine.distributed import start_ranks
from tools.gpu.numerics import exact_matmul, relative
from tools.gpu.results import Report
from tools.gpu.runner import Options, Part
from tools.gpu.workload import make_config, make_trainer, random_batch, with_data

SIDE, BATCH, STEPS = 128, 8, 3
SAME = 1e-4  # limit of the relative difference of a loss


@dataclass(frozen=True)
class Training:
    """Hold the loss of each batch, how often gradients were exchanged, and a sum over the weights."""

    losses: list[float]
    exchanges: int
    weights: float


def parts(options: Options) -> dict[str, Part]:
    """Return the parts of the item; each starts processes that use the GPU, and does not use it itself."""
    return {'two ranks': two_ranks, 'accumulation': accumulation, 'one rank': one_rank}


def small_config(options: Options, **changes) -> Config:
    """Make the demo config at a small size, in fp32, with a loss that is a mean over pixels."""
    side, batch = (64, 4) if options.tiny else (SIDE, BATCH)
    sizes = {'image_size': side, 'crop_size': side, 'batch_size': batch, 'workers': 0}
    plain = {'loss': {'ce': 1}, 'class_weights': None, 'dropout': 0, 'amp': 'off', 'warmup_iters': 0}
    return with_data(make_config('demo', options, **sizes, **plain, **changes), options, 'ranks')


def two_ranks(options: Options, report: Report) -> None:
    """Compare two ranks with one process that has all of each batch."""
    cfg = small_config(options)
    (alone,) = train_ranks(cfg, options, 1, None)
    ranks = train_ranks(cfg, options, 2, 'gloo')
    compare('two ranks', alone, ranks, options, report)


def accumulation(options: Options, report: Report) -> None:
    """Compare the same with two batches a step; the ranks must exchange gradients once a step."""
    once = train_ranks(small_config(options), options, 2, 'gloo')[0].exchanges
    cfg = small_config(options, accumulate=2)
    (alone,) = train_ranks(cfg, options, 1, None)
    ranks = train_ranks(cfg, options, 2, 'gloo')
    compare('accumulation', alone, ranks, options, report)
    note = f'{once} for as many steps of one batch'
    report.at_most('accumulation: exchanges of gradients', ranks[0].exchanges, once, note=note)


def compare(name: str, alone: Training, ranks: list[Training], options: Options, report: Report) -> None:
    """Compare the losses of a process with the mean of those of ranks, and the ranks' weights."""
    means = [sum(losses) / len(ranks) for losses in zip(*(rank.losses for rank in ranks), strict=True)]
    worst = max(relative(mean, loss) for mean, loss in zip(means, alone.losses, strict=True))
    what = f'{name}: losses of {len(means)} batches against one process'
    if options.device == 'cuda':
        report.at_most(what, worst, SAME)
    else:
        report.not_applicable(what, f'BatchNorm is synchronised on GPUs only; {worst:.1e} without')
    report.holds(f'{name}: the ranks have the same weights', len({rank.weights for rank in ranks}) == 1)


def one_rank(options: Options, report: Report) -> None:
    """Train in a process group of one rank, as torchrun starts it."""
    cfg = small_config(options)
    (alone,) = train_ranks(cfg, options, 1, None)
    backend = 'nccl' if options.device == 'cuda' else 'gloo'
    (rank,) = train_ranks(cfg, options, 1, backend)
    worst = max(relative(a, b) for a, b in zip(rank.losses, alone.losses, strict=True))
    report.at_most(f'one rank of {backend}: losses of {STEPS} batches against no ranks', worst, SAME)


def train_ranks(cfg: Config, options: Options, world: int, backend: str | None) -> list[Training]:
    """Train in so many processes, forked; return what each did. Raises RuntimeError if one fails."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    context, files = multiprocessing.get_context('fork'), []
    processes = []
    for rank in range(world):
        files.append(options.folder / f'rank{rank}.json')
        words = (cfg, rank, world, backend, port, files[-1])
        processes.append(context.Process(target=train_rank, args=words))
        processes[-1].start()
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in connection.wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                for other in running.values():
                    other.kill()  # it would wait for the one that has failed
                raise RuntimeError(f'a rank of {world} ended with status {process.exitcode}')
    return [Training(**json.loads(file.read_text())) for file in files]


def train_rank(cfg: Config, rank: int, world: int, backend: str | None, port: int, file: Path) -> None:
    """Train some steps as one of the ranks, or without any if there is no backend; write what it did."""
    if backend:
        os.environ |= {'RANK': f'{rank}', 'WORLD_SIZE': f'{world}', 'LOCAL_RANK': f'{rank}'}
        os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': f'{port}', 'RANKS_BACKEND': backend}
        os.environ['TORCHELASTIC_RUN_ID'] = 'check'  # as torchrun sets it
    exact_matmul()
    ranks, exchanges = start_ranks(cfg), []
    batches = [*split_batches(cfg, rank, world, STEPS * cfg.accumulate)]
    trainer = make_trainer(cfg, ranks, fold=-1, batches=batches)
    if isinstance(trainer.forward, DistributedDataParallel):
        trainer.forward.register_comm_hook(exchanges, count_exchange)
    for _ in trainer.steps(0):
        pass
    weights = float(sum(value.detach().double().abs().sum() for value in trainer.model.parameters()))
    file.write_text(json.dumps({'losses': trainer.losses, 'exchanges': len(exchanges), 'weights': weights}))


def split_batches(cfg: Config, rank: int, world: int, count: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield a rank's part of batches; every second one has its photos in another order."""
    batch = random_batch(cfg)
    for number in range(count):
        yield tuple(part.roll(number % 2, 0)[rank::world] for part in batch)


def count_exchange(exchanges: list, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients over the ranks, and count it."""
    exchanges.append(bucket.index())
    return allreduce_hook(None, bucket)
