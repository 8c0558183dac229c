"""Ranks: the processes of one training, one a GPU, and their random numbers."""

import atexit
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from config import Config
from utils.errors import BadInput

T = TypeVar('T')


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together, and its device."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def alone(cls) -> 'Ranks':
        """One process on the CPU."""
        return cls(0, 1, torch.device('cpu'))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Adds a tensor up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def sync_bn(self, cfg: Config) -> bool:
        """Whether BatchNorm is taken over all ranks; torch can do it on GPUs alone."""
        return self.world > 1 and cfg.sync_bn and self.device.type == 'cuda'

    def broadcast(self, model: torch.nn.Module) -> None:
        """Gives every rank the weights and BatchNorm statistics of rank 0."""
        if self.world > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, src=0)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """(world, ...) what each rank has, of one shape and type, on every rank; on the CPU."""
        if self.world == 1:
            return values[None].cpu()
        values = values.to(self.device)
        found = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(found, values)
        return torch.stack(found).cpu()

    def any_rank(self, *flags: bool) -> list[bool]:
        """Each of the flags, set where it is on any rank."""
        if self.world == 1:
            return list(flags)
        return [bool(count) for count in self.sum(torch.tensor(flags, device=self.device).int())]

    def shard(self, count: int) -> range:
        """The places of `count` that are this rank's to do."""
        return range(self.rank, count, self.world)

    def main_process_first(self, make: Callable[[], T], find: Callable[[], T] | None = None) -> T:
        """What rank 0 makes, and the others find when it is there, by the same call where none is given."""
        made = make() if self.is_main else None
        self.wait()
        return made if self.is_main else (find or make)()

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


def start_ranks(cfg: Config) -> Ranks:
    """Joins the other ranks where torchrun started this process; alone otherwise. Raises BadInput for a
    device that is not there, or is one too few.
    """
    if cfg.device == 'cuda' and not torch.cuda.is_available():
        raise BadInput("config key 'device': found cuda, but torch sees no GPU here; expected auto or cpu")
    use_gpu = cfg.device != 'cpu' and torch.cuda.is_available()
    device = torch.device('cuda' if use_gpu else 'cpu')
    world = int(os.environ.get('WORLD_SIZE', 1))
    if world == 1:
        return Ranks(0, 1, device)
    if use_gpu:
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        if device.index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise BadInput(f'--nproc-per-node: expected one process a GPU at most; torch sees {count} here')
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # rank 0 builds caches and pseudo-labels while the others wait
        dist.init_process_group('nccl' if use_gpu else 'gloo', timeout=timedelta(hours=3))
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), world, device)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Of all generators that are not handed around; deterministic: torch takes no algorithm that varies."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries that use the global generator
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # which torch asks for
        torch.use_deterministic_algorithms(True)
