"""The parts of each item of the GPU check, with all that they import."""

import platform
from collections.abc import Callable

import torch

from tools.gpu import compiled, determinism, numerics, ranks, runs, speed
from tools.gpu.results import Report
from tools.gpu.runner import Options, Part


def machine(options: Options) -> dict[str, Part]:
    return {'machine': describe}


def describe(options: Options, report: Report) -> None:
    """Name the device, and the versions that results depend on."""
    versions = f'torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}'
    if options.device == 'cpu':
        report.measured('machine', torch.get_num_threads(), 'threads', f'{platform.machine()}, {versions}')
    elif not torch.cuda.is_available():
        report.not_applicable('machine', 'torch sees no GPU')
    else:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        name = f'{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}'
        report.measured('machine', memory, 'GiB', f'{name}, {versions}')


PARTS: dict[int, Callable[[Options], dict[str, Part]]] = {
    0: machine,
    1: speed.peak_parts,
    2: numerics.parts,
    3: determinism.determinism_parts,
    4: determinism.resume_parts,
    5: ranks.parts,
    6: speed.train_parts,
    7: compiled.train_parts,
    8: compiled.predict_parts,
    9: runs.loader_parts,
    10: runs.training_parts,
    11: runs.other_parts,
}
