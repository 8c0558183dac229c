"""What made a run: provenance.yaml in its folder, and changes.diff where the code differs from its commit."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import yaml

from files import write_text

PACKAGES = (
    'torch', 'torchvision', 'timm', 'segmentation-models-pytorch', 'albumentations', 'opencv-python-headless',
    'numpy', 'pandas', 'pycocotools', 'ttach', 'pydantic',
)  # fmt: skip
ROOT = Path(__file__).resolve().parent


def write_provenance(folder: Path, fingerprint: str, world: int) -> None:
    """Adds an entry for this start of the run; a run that goes on has several. Raises BadInput."""
    diff = git('diff', 'HEAD')
    entry = {
        'started': datetime.now(UTC).isoformat(timespec='seconds'),
        'command': shlex.join([Path(sys.executable).name, *sys.argv]),
        'commit': (git('rev-parse', 'HEAD') or 'unknown').strip(),
        'changed': bool(diff),
        'data': fingerprint,
        'ranks': world,
        'hardware': hardware(),
        'python': platform.python_version(),
        'versions': {name: found for name in PACKAGES if (found := installed(name))},
    }
    path = folder / 'provenance.yaml'
    before = path.read_text(encoding='utf-8') if path.exists() else ''
    write_text(path, before + yaml.safe_dump([entry], sort_keys=False, width=1000))
    if diff:
        write_text(folder / 'changes.diff', diff)


def git(*words: str) -> str | None:
    """What git says of this code; None where there is none, or it is not a repository."""
    try:
        done = subprocess.run(
            ['git', '-C', str(ROOT), *words], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout


def hardware() -> str:
    if torch.cuda.is_available():
        return f'{torch.cuda.device_count()} x {torch.cuda.get_device_name()}'
    return f'{os.cpu_count()} cores, {platform.machine()}'


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
