"""The ranks of a training, one process for each GPU, and their random numbers.

torchrun starts the ranks, on one machine or several. They use NCCL on GPUs, and gloo on CPUs. With
RANKS_BACKEND=gloo in the environment they use gloo on GPUs too, slowly; then several may share a GPU.
"""

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
    joined: bool = False  # in a process group, which may be of this rank alone

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
        if self.joined:
            dist.all_reduce(values)
        return values

    def sync_bn(self, cfg: Config) -> bool:
        """Tell whether BatchNorm is synchronised over the ranks; torch can do that on GPUs only."""
        return self.world > 1 and cfg.sync_bn and self.device.type == 'cuda'

    def min_batch(self, cfg: Config) -> int:
        """Return the fewest photos that BatchNorm needs in a batch: two a rank unless it is synchronised."""
        return self.world if self.sync_bn(cfg) else 2 * self.world

    def broadcast(self, model: torch.nn.Module) -> None:
        """Copy the weights and BatchNorm statistics of rank 0 to all ranks."""
        if self.joined:
            for value in model.state_dict().values():
                dist.broadcast(value, src=0)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all ranks, of one shape and type, as one (world, ...) on the CPU."""
        if not self.joined:
            return values[None].cpu()
        values = values.to(self.device)
        gathered = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(gathered, values)
        return torch.stack(gathered).cpu()

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return each flag as true if it is true on any rank."""
        if not self.joined:
            return list(flags)
        return [bool(count) for count in self.sum(torch.tensor(flags, device=self.device).int())]

    def shard(self, count: int) -> range:
        """Return the indices, out of `count`, that this rank works on."""
        return range(self.rank, count, self.world)

    def main_process_first(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 while the others wait, then on them, who find what it has made."""
        result = make() if self.is_main else None
        self.wait()
        return result if self.is_main else make()

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        if self.joined:
            dist.barrier()


def start_ranks(cfg: Config) -> Ranks:
    """Join the other ranks if torchrun started this process. Raises BadInput for a missing device."""
    if cfg.device == 'cuda' and not torch.cuda.is_available():
        raise BadInput("config key 'device': found cuda, but torch sees no GPU; expected auto or cpu")
    use_gpu = cfg.device != 'cpu' and torch.cuda.is_available()
    device, world = torch.device('cuda' if use_gpu else 'cpu'), int(os.environ.get('WORLD_SIZE', 1))
    if world == 1 and not dist.is_torchelastic_launched():  # as torchrun does
        return Ranks(0, 1, device)
    backends = ['nccl', 'gloo'] if use_gpu else ['gloo']
    backend = os.environ.get('RANKS_BACKEND', backends[0])
    if backend not in backends:
        expected = f'expected {" or ".join(backends)} on a {device.type}'
        raise BadInput(f'environment variable RANKS_BACKEND: found {backend!r}, {expected}')
    if use_gpu:
        index, count = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
        if index >= count and backend == 'nccl':
            expected = 'expected one process a GPU at most, or RANKS_BACKEND=gloo in the environment'
            raise BadInput(f'--nproc-per-node: {expected}; torch sees {count} here')
        device = torch.device('cuda', index % count)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # rank 0 builds caches and pseudo-labels while the others wait
        device_id = device if backend == 'nccl' else None
        dist.init_process_group(backend, timeout=timedelta(hours=3), device_id=device_id)
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), world, device, joined=True)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; `deterministic` algorithms of torch give the same bits each time."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries that use the global generator
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # torch asks for it
        torch.use_deterministic_algorithms(True)
