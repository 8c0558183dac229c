"""Files of tensors, read without running any code in them; sizes are checked before anything is allocated.

    state = read_tensors('best.pt')         # or .pth, .bin, .safetensors

torch alone would decompress what is packed, and give a mapped file's own bytes as numbers; a pickle may hold
a tuple that takes years to hash, or ask for an array of any size, though all that is in it is data.
"""

import io
import pickletools
import struct
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils.errors import BadInput, one_line

SAFE_TORCH = (2, 6)  # before it, weights_only=True could be made to run code (CVE-2025-32434)
LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # how torch.save's format before 1.6 begins
LEGACY_PICKLES = 5  # of which such a file consists, before the numbers
MAX_PICKLE = 1 << 26  # bytes of names and shapes, without the numbers
MAX_WEIGHT = 10_000_000  # parts of an object, those that are in it twice counted twice
GLOBALS = {
    'collections OrderedDict',
    'torch Size',
    'torch device',
    'torch._utils _rebuild_tensor',
    'torch._utils _rebuild_tensor_v2',
    'torch._utils _rebuild_parameter',
}
STORAGES = {  # bytes of a number
    f'{kind}Storage': size
    for size, kinds in {
        1: ('Bool', 'Byte', 'Char', 'Untyped'),
        2: ('BFloat16', 'Half', 'Short'),
        4: ('Float', 'Int'),
        8: ('ComplexFloat', 'Double', 'Long'),
        16: ('ComplexDouble',),
    }.items()
    for kind in kinds
}
# what readers of torch, pickletools and zipfile raise for bytes that are not what they expect
FAULTS = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    ArithmeticError, MemoryError, NotImplementedError, struct.error, UnpicklingError, zipfile.BadZipFile,
    SafetensorError,
)  # fmt: skip


def read_tensors(path: Path) -> Any:
    """What torch.save or safetensors wrote, on the CPU; numbers stay in the file until they are needed.
    Raises BadInput for anything else, and for a torch that is not safe.
    """
    if torch.__version__ < SAFE_TORCH:
        raise BadInput(f'torch {torch.__version__}: loading with it may run code in the file; expected 2.6')
    if not path.is_file():
        raise BadInput(f'{path}: no such file' if not path.exists() else f'{path}: is not a file')
    try:
        if path.suffix == '.safetensors':
            return load_file(path)
        with path.open('rb') as file:
            start = file.read(len(LEGACY))
            if start[:4] == b'PK\3\4':  # as torch decides it
                check_archive(file, path.stat().st_size)
                return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
            if start != LEGACY:
                raise ValueError('does not begin as torch.save has it')
            content = io.BytesIO(start + file.read())  # of a path torch would unpack a tar too
        for _ in range(LEGACY_PICKLES):
            check_pickle(content)
        content.seek(0)
        return torch.load(content, map_location='cpu', weights_only=True)
    except FAULTS as error:
        raise BadInput(f'{path}: no file of tensors, or cut off: {one_line(error)[:160]}') from None


def check_archive(file: BinaryIO, size: int) -> None:
    """Raises ValueError for a zip whose files, written out, are larger than it, for a hostile pickle in it,
    and for tensors of other sizes than the files that hold their numbers.
    """
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError('is compressed, which torch.save never does')
        stored = sum(entry.file_size for entry in entries.values())
        if stored > size or any(entry.file_size != entry.compress_size for entry in entries.values()):
            raise ValueError(f'says that it holds {stored:,} bytes, and has {size:,}')
        pickled = [entry for name, entry in entries.items() if name.endswith('/data.pkl')]
        if len(pickled) != 1 or pickled[0].file_size > MAX_PICKLE:
            raise ValueError(f'expected one data.pkl of at most {MAX_PICKLE:,} bytes in it')
        folder = pickled[0].filename.removesuffix('data.pkl')
        for key, wanted in check_pickle(io.BytesIO(archive.read(pickled[0]))):
            found = entries[f'{folder}data/{key}'].file_size
            if found != wanted:
                raise ValueError(f'numbers {key!r} have {found:,} bytes, their tensor says {wanted:,}')


def check_pickle(file: BinaryIO) -> list[tuple[str, int]]:
    """Reads a pickle without running it: the name and the bytes of each array of numbers it refers to.

    Raises ValueError for one that makes anything but tensors, plain values and containers, or whose parts,
    each counted as often as it is used, are more than MAX_WEIGHT.
    """
    stack: list[tuple[int, Any] | None] = []  # weight, and value of texts, numbers and tuples; None is a mark
    memo: dict[int, tuple[int, Any]] = {}
    storages = []
    for opcode, arg, _ in pickletools.genops(file):
        if opcode.name == 'GLOBAL':
            check_global(arg)
        elif opcode.name in ('PUT', 'BINPUT', 'LONG_BINPUT'):
            memo[arg] = stack[-1]
        elif opcode.name in ('GET', 'BINGET', 'LONG_BINGET'):
            stack.append(memo[arg])
            continue
        elif opcode.name == 'BINPERSID':
            _, kind, key, _, count = stack[-1][1][:5]
            storages.append((str(key), count * STORAGES[kind.split()[-1]]))
        before, parts = list(opcode.stack_before), []
        if pickletools.stackslice in before:
            while (part := stack.pop()) is not None:
                parts.insert(0, part)
            before = before[: before.index(pickletools.markobject)]
        parts = [stack.pop() for _ in before][::-1] + parts
        weight = 1 + sum(part[0] for part in parts)
        if weight > MAX_WEIGHT:
            raise ValueError('one object would have millions of parts')
        value = tuple(part[1] for part in parts) if opcode.name.startswith('TUPLE') else arg
        made = (weight, value)
        stack += [None if kind is pickletools.markobject else made for kind in opcode.stack_after]
    return storages


def check_global(name: str) -> None:
    """Raises ValueError unless a pickled tensor needs it: 'module name'."""
    module, _, member = name.partition(' ')
    is_dtype = module == 'torch' and isinstance(getattr(torch, member, None), torch.dtype)
    is_storage = module in ('torch', 'torch.storage') and member in STORAGES
    if name not in GLOBALS and not is_dtype and not is_storage:
        raise ValueError(f'needs {name[:80].replace(" ", ".")}, which is no tensor')
