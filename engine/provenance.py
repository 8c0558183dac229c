"""Record what made a run: provenance.yaml, and changes.diff where the code differs from its commit; a later
start with other changes writes changes-2.diff, and so on.
"""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from utils.errors import BadInput
from utils.files import file_hash, write_text
from utils.paths import path_from
from utils.yaml_files import parse_yaml

PACKAGES = (
    'torch', 'torchvision', 'timm', 'segmentation-models-pytorch', 'albumentations',
    'opencv-python-headless', 'numpy', 'pandas', 'pycocotools', 'ttach', 'pydantic',
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]


def write_provenance(folder: Path, fingerprint: str, world: int, sources: Sequence[Path] = ()) -> None:
    """Add an entry for this start of the run, with the annotations' fingerprint and source checkpoints."""
    diff = git('diff', 'HEAD')
    entry = {
        'started': datetime.now(UTC).isoformat(timespec='seconds'),
        'command': shlex.join([Path(sys.executable).name, *sys.argv]),
        'commit': commit(),
        'changed': bool(diff),
        'untracked': git('ls-files', '--others', '--exclude-standard').splitlines(),
        'data': fingerprint,
        **({'sources': {path_from(folder, path): file_hash(path) for path in sources}} if sources else {}),
        'ranks': world,
        'hardware': hardware(),
        'python': platform.python_version(),
        'versions': {name: number for name in PACKAGES if (number := installed(name))},
    }
    if diff:
        entry['diff'] = keep_diff(folder, diff)
    path = folder / 'provenance.yaml'
    before = read_provenance(path)
    write_text(path, before + yaml.safe_dump([entry], sort_keys=False, width=1000))


def keep_diff(folder: Path, diff: str) -> str:
    """Write the diff of a start beside those of earlier ones, unless one of them is the same; return its
    name.
    """
    number = 1
    while True:
        path = folder / ('changes.diff' if number == 1 else f'changes-{number}.diff')
        if not path.exists():
            write_text(path, diff)
        if path.read_bytes() == diff.encode():
            return path.name
        number += 1


def last_provenance(folder: Path) -> dict | None:
    """Return the entry of the last start of the run in a folder, None without one. Raises BadInput."""
    path = folder / 'provenance.yaml'
    text = read_provenance(path)
    start = text.rfind('- started:')
    if start < 0:
        return None
    entry = parse_yaml(text[start:], where=str(path))[0]
    if not isinstance(entry, dict) or not isinstance(entry.get('versions', {}), dict):
        raise BadInput(f'{path}: is damaged: its last entry lacks the versions; move it away')
    return entry


def first_command(folder: Path) -> str | None:
    """Return the command that started the run in a folder, None if it is not known. Raises BadInput."""
    text = read_provenance(folder / 'provenance.yaml')
    entries = parse_yaml(text, where=str(folder / 'provenance.yaml')) if text else None
    first = entries[0] if isinstance(entries, list) and entries else None
    command = first.get('command') if isinstance(first, dict) else None
    return command if isinstance(command, str) else None


def read_provenance(path: Path) -> str:
    """Return the text of a provenance.yaml, '' if there is none. Raises BadInput if it is damaged."""
    try:
        return path.read_text(encoding='utf-8') if path.exists() else ''
    except UnicodeDecodeError:
        raise BadInput(f'{path}: is damaged: not UTF-8; move it away') from None


def compare_provenance(folder: Path, fingerprint: str) -> list[str]:
    """List what differs from the last start of a run. Raises BadInput if the annotations have changed."""
    path, before = folder / 'provenance.yaml', last_provenance(folder)
    if before is None:
        return []
    if before.get('data') != fingerprint:
        change = f'{str(before.get("data"))[:12]} then, {fingerprint[:12]} now; start again with --overwrite'
        raise BadInput(f'{path}: the annotations have changed since the run began: {change}')
    old = before | (before.get('versions') or {})
    new = {'commit': commit(), 'hardware': hardware()} | {name: installed(name) for name in PACKAGES}
    return [f'{key} is {new[key]}, and was {old.get(key)}' for key in new if new[key] != old.get(key)]


def git(*words: str) -> str:
    """Return the output of a git command in this repository; '' without git or a repository."""
    # a checkout of another user is trusted with more: this code is run
    command = ['git', '-c', f'safe.directory={ROOT}', '-C', str(ROOT), *words]
    text = {'encoding': 'utf-8', 'errors': 'replace'}
    try:
        return subprocess.run(command, capture_output=True, timeout=30, check=True, **text).stdout
    except (OSError, subprocess.SubprocessError):
        return ''


def commit() -> str:
    return git('rev-parse', 'HEAD').strip() or 'unknown'


def hardware() -> str:
    """Describe the GPUs of this machine, or its cores."""
    import torch  # slow to import, and the app needs none

    if torch.cuda.is_available():
        return f'{torch.cuda.device_count()} x {torch.cuda.get_device_name()}'
    return f'{os.cpu_count()} cores, {platform.machine()}'


def installed(name: str) -> str | None:
    """Return the installed version of a package, None without it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
