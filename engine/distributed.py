"""The ranks of a training, one process for each GPU, and their random numbers."""

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
    """This process, its device, and the number of processes that work together (`world`)."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def alone(cls) -> 'Ranks':
        """Return the only rank, on the CPU."""
        return cls(0, 1, torch.device('cpu'))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files and the log."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def sync_bn(self, cfg: Config) -> bool:
        """Tell whether BatchNorm is synchronised over the ranks; torch can do that on GPUs only."""
        return self.world > 1 and cfg.sync_bn and self.device.type == 'cuda'

    def broadcast(self, model: torch.nn.Module) -> None:
        """Copy the weights and BatchNorm statistics of rank 0 to all ranks."""
        if self.world > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, src=0)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all ranks, of one shape and type, as one (world, ...) on the CPU."""
        if self.world == 1:
            return values[None].cpu()
        values = values.to(self.device)
        gathered = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(gathered, values)
        return torch.stack(gathered).cpu()

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return each flag as true if it is true on any rank."""
        if self.world == 1:
            return list(flags)
        return [bool(count) for count in self.sum(torch.tensor(flags, device=self.device).int())]

    def shard(self, count: int) -> range:
        """Return the indices, out of `count`, that this rank works on."""
        return range(self.rank, count, self.world)

    def main_process_first(self, make: Callable[[], T], find: Callable[[], T] | None = None) -> T:
        """Call `make` on rank 0 while the others wait; then `find`, or `make` again, on them."""
        result = make() if self.is_main else None
        self.wait()
        return result if self.is_main else (find or make)()

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        if self.world > 1:
            dist.barrier()


def start_ranks(cfg: Config) -> Ranks:
    """Join the other ranks if torchrun started this process. Raises BadInput for a missing device."""
    if cfg.device == 'cuda' and not torch.cuda.is_available():
        raise BadInput("config key 'device': found cuda, but torch sees no GPU; expected auto or cpu")
    use_gpu = cfg.device != 'cpu' and torch.cuda.is_available()
    device, world = torch.device('cuda' if use_gpu else 'cpu'), int(os.environ.get('WORLD_SIZE', 1))
    if world == 1:
        return Ranks(0, 1, device)
    if use_gpu:
        device, count = torch.device('cuda', int(os.environ['LOCAL_RANK'])), torch.cuda.device_count()
        if device.index >= count:
            raise BadInput(f'--nproc-per-node: expected one process a GPU at most; torch sees {count} here')
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # rank 0 builds caches and pseudo-labels while the others wait
        dist.init_process_group('nccl' if use_gpu else 'gloo', timeout=timedelta(hours=3))
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), world, device)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; `deterministic` algorithms of torch give the same bits each time."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries that use the global generator
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # torch asks for it
        torch.use_deterministic_algorithms(True)
