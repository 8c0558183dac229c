"""Read .pt, .pth, .bin or .safetensors files. A hostile one may cost memory, but runs no code."""

import re
import struct
import zipfile
from argparse import Namespace
from pathlib import Path, PosixPath
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils.errors import BadInput, one_line

SAFE_TORCH = (2, 6)  # before it, weights_only=True could be made to run code (CVE-2025-32434)
ZIP = b'PK\3\4'  # how a file of torch.save begins
LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # and how it began before torch 1.6
OTHER_FILES = {  # by the first bytes, in lower case
    b'version https://': 'no file of tensors, but a pointer of Git LFS; fetch the file: git lfs pull',
    b'<!doctype html': 'no file of tensors, but a web page; download it again',
    b'<html': 'no file of tensors, but a web page; download it again',
}
# objects beside the tensors of timm's and Lightning's checkpoints, which hold values and run nothing
PLAIN = [Namespace, PosixPath]
# what torch and safetensors were seen to raise for files that are cut off, or have some bytes changed
LOAD_ERRORS = (
    OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
    struct.error, UnpicklingError, zipfile.BadZipFile, SafetensorError,
)  # fmt: skip


def read_tensors(path: Path) -> Any:
    """Return what torch.save or safetensors wrote, on the CPU. Raises BadInput, also for an unsafe torch."""
    if torch.__version__ < SAFE_TORCH:
        raise BadInput(f'torch {torch.__version__}: loading with it may run code in the file; expected 2.6')
    if not path.is_file():
        raise BadInput(f'{path}: is not a file' if path.exists() else f'{path}: no such file')
    try:
        with path.open('rb') as file:
            start = file.read(len(LEGACY))
        for other, fault in OTHER_FILES.items():
            if start.lstrip().lower().startswith(other[: len(LEGACY)]):
                raise BadInput(f'{path}: {fault}')
        is_zip = start.startswith(ZIP)
        if path.suffix == '.safetensors' or start[8:9] == b'{':  # a length and JSON, under any name
            return load_file(path)
        if not is_zip and start != LEGACY:
            raise ValueError('neither torch.save nor safetensors wrote it')
        if is_zip and is_compressed(path):
            raise ValueError('it is compressed, which torch.save never does')
        with torch.serialization.safe_globals(PLAIN):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=is_zip)
    except LOAD_ERRORS as error:
        if refused := re.search(r'Unsupported global: GLOBAL (\S+)', str(error)):
            raise BadInput(f'{path}: {describe_refusal(refused[1])}') from None
        raise BadInput(f'{path}: no file of tensors, or cut off: {one_line(error)[:160]}') from None


def describe_refusal(name: str) -> str:
    """Say which Python object a file holds beside its tensors, and how to save the tensors alone."""
    found = f'no file of tensors: it holds a Python object, {name[:80]}, which may run code when it is loaded'
    resave = "torch.save(model.state_dict(), 'weights.pth')"
    return f'{found}; expected tensors alone; load it where it was made, and save it again with {resave}'


def is_compressed(path: Path) -> bool:
    """Tell whether a zip is compressed; torch would take the packed bytes for numbers."""
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def refuse_changed(path: Path) -> None:
    """Raise BadInput if a tensor of what torch.save wrote has other bytes now, by its CRC-32; torch.load does
    not look. Reads the file: some seconds a gigabyte.
    """
    if not zipfile.is_zipfile(path):  # as before torch 1.6
        return
    try:
        with zipfile.ZipFile(path) as archive:
            name = archive.testzip()
        fault = name and f'{name} has other bytes than were written'
    except LOAD_ERRORS as error:
        fault = one_line(error)[:160]
    if fault:
        raise BadInput(f'{path}: is damaged: {fault}; restore it from a backup, or train it again')
