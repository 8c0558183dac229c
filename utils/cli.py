"""The command line that all scripts share: how a script ends, its options and help, and the next command."""

import argparse
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

from utils.errors import (
    BAD_INPUT,
    DONE,
    INTERRUPTED,
    BadInput,
    CheckFailed,
    Interrupted,
    find_shortage,
    one_line,
)
from utils.log import say
from utils.signals import StopRequest, exit_on_signals, interrupt_on_signals


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run main and exit with its status: 0 done, 1 a check failed, 2 bad input, 75 interrupted, resumable."""
    sys.exit(exit_status(main))


def parse_early(parse: Callable[[], object]) -> None:
    """Read the arguments and the config, so that --help and a typo answer before torch is imported.

    A script calls it under `if __name__ == '__main__':`, between its light imports and its heavy ones.
    """

    def check() -> None:
        parse()

    status = exit_status(check)
    if status != DONE:
        sys.exit(status)
    exit_on_signals(f'{script_name()}: interrupted', INTERRUPTED)
    sys.excepthook = end_for_shortage


def end_for_shortage(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a process whose imports find no memory, or no open files, in one line, as tell_shortage does."""
    status = tell_shortage(error)
    if status is None:
        sys.__excepthook__(kind, error, trace)
    else:
        os._exit(status)


def exit_status(main: Callable[[], int | None]) -> int:
    """Call main and return its exit status; an error that a person can mend is one line on standard error.

    If the reader of the output is gone, as after `| head`, the command goes on without it.
    """
    open_standard_streams()
    use_utf8()
    with redirect_stdout(Output(sys.stdout)) as out, redirect_stderr(Output(sys.stderr)) as errors:
        try:
            return call(main)
        finally:
            out.end()
            errors.end()


def call(main: Callable[[], int | None]) -> int:
    """Call main and return its exit status, as exit_status does."""
    with interrupt_on_signals() as stop:
        try:
            status = main() or DONE
            sys.stdout.flush()
            return status
        except (Exception, KeyboardInterrupt) as error:
            status = tell(error, stop)
            if status is None:
                raise
            return status


def tell(error: BaseException, stop: StopRequest) -> int | None:
    """Say in one line what has ended main, and return the exit status; None for a fault of the code."""
    if isinstance(error, Interrupted):
        print(f'{script_name()}: {one_line(error)}', file=sys.stderr)
        return INTERRUPTED
    if stop.asked or isinstance(error, KeyboardInterrupt):  # whatever a library has made of it
        print(f'{script_name()}: interrupted', file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, (BadInput, CheckFailed)):
        say(f'{script_name()}: error: {one_line(error)}', sys.stderr)
        return error.status
    return tell_shortage(error)  # raised by a library


def tell_shortage(error: BaseException) -> int | None:
    """Say in one line what the machine ran out of, if that caused an error, and return the exit status."""
    shortage = find_shortage(error)
    if shortage is None:
        return None
    kind = 'error: ' if shortage.status == BAD_INPUT else ''
    place = f'{one_line(error.filename)}: ' if isinstance(error, OSError) and error.filename else ''
    say(f'{script_name()}: {kind}{place}{shortage.advice}', sys.stderr)
    return shortage.status


def open_standard_streams() -> None:
    """Open those of standard input, output and error that are closed: a checkpoint would get their number,
    and whatever a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def use_utf8() -> None:
    """Start again in UTF-8 mode if names of files have another encoding, in which most of them cannot be."""
    if sys.getfilesystemencoding() != 'utf-8' and os.environ.get('PYTHONUTF8') != '1':
        os.environ['PYTHONUTF8'] = '1'
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Output:
    """Write to a stream as long as it has a reader; what comes after is dropped. Characters that its encoding
    lacks are written as \\u escapes.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or io.StringIO()  # None if it was closed before the start
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.drop()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.drop()

    def end(self) -> None:
        """Write what is left, if that can be, so that Python has nothing to complain of when it ends."""
        try:
            self.stream.flush()
        except OSError:
            self.drop()

    def drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


def script_name() -> str:
    """Return the script as it was typed: 'train.py', or 'python -m tools.soup'."""
    spec = sys.modules['__main__'].__spec__  # None unless it was started with -m
    if spec is not None and spec.origin == sys.argv[0]:
        return f'python -m {spec.name.removesuffix(".__main__")}'
    return Path(sys.argv[0]).name


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the layout of the description, and show the default of each option."""


class ArgumentParser(argparse.ArgumentParser):
    """Parse arguments; the help shows the script's docstring, defaults and examples; an error is one line."""

    def __init__(self, doc: str | None, examples: str = '', **kwargs: Any) -> None:
        """Show those lines of `examples` that call this command; python -OO leaves no docstring to show."""
        doc = doc or ''
        options = {'prog': script_name(), 'description': doc, 'formatter_class': HelpFormatter}
        super().__init__(**options | kwargs)
        calls = [line.strip() for line in examples.splitlines() if f'{self.prog} ' in line]
        self.epilog = '\n    '.join(['examples:', *calls]) if calls else None

    def add_subparsers(self, **kwargs: Any) -> 'Commands':
        """Add commands; each shows those lines of the script's own docstring that call it."""
        parser_class = partial(ArgumentParser, examples=self.description)
        options = {'metavar': 'COMMAND', 'parser_class': parser_class, **kwargs}
        return Commands(super().add_subparsers(**options))

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse arguments, as parse_args does too; refuse one that is not UTF-8, which no file could hold."""
        for word in sys.argv[1:] if args is None else args:
            if not word.isascii() and re.search('[\ud800-\udfff]', word):
                self.error(f'{word!r} is not UTF-8; give the file or folder another name')
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        return re.sub(r'\s*\(default:\s+(None|False|\[\])\)', '', super().format_help())

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f'{self.prog}: error: {one_line(message)}; see --help\n')


class Commands:
    """The commands of a script, such as `check` in `prepare.py check`."""

    def __init__(self, subparsers: Any) -> None:
        self.subparsers = subparsers

    def add_parser(self, name: str, doc: str, **kwargs: Any) -> ArgumentParser:
        """Add a command; `doc` is its description, and its line in the help of the script."""
        return self.subparsers.add_parser(name, doc=doc, **{'help': doc.replace('%', '%%'), **kwargs})


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --cfg and --set. A script that needs only the classes and the data root does not require --cfg."""
    another = 'config with data_root, and classes if competition.yaml has none; by default none'
    config = 'config of the run, a file of configs/' if required else another
    parser.add_argument('--cfg', required=required, type=Path, metavar='YAML', help=config)
    change = {'nargs': '+', 'action': 'extend', 'default': [], 'metavar': 'KEY=VALUE'}
    parser.add_argument('--set', **change, help='keys of the config to change')


MAX_SEED = 2**32 - 1  # NumPy takes no larger one, and none below 0


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --cfg, --set, --fold, and --resume and --overwrite, of which a run takes one at most."""
    add_config_arguments(parser)
    parser.add_argument('--fold', type=int, required=True, help='fold to validate on, or -1 to train on all')
    group = parser.add_mutually_exclusive_group()
    group.add_argument('--resume', action='store_true', help='continue from last.pt, if there is one')
    group.add_argument('--overwrite', action='store_true', help='start again, whatever the run folder holds')


def parse_fold(text: str) -> int | None:
    """Convert the text of --fold: a number from 0, -1 (trained on everything), or None for 'all'."""
    if text == 'all':
        return None
    if not re.fullmatch(r'-1|\d{1,3}', text, re.ASCII):
        raise argparse.ArgumentTypeError(f'found {text[:40]!r}, expected a fold from 0, -1, or all')
    return int(text)


def at_least(least: int, most: int = 10_000) -> Callable[[str], int]:
    """Return the type of an option that takes a whole number within these limits."""

    def parse(text: str) -> int:
        if not re.fullmatch(r'\d{1,12}', text, re.ASCII) or not least <= int(text) <= most:
            problem = f'found {text[:40]!r}, expected a whole number from {least} to {most}'
            raise argparse.ArgumentTypeError(problem)
        return int(text)

    return parse


def next_line(*words: object, cfg: Path | None = None, changes: Sequence[str] = ()) -> str:
    """Return a line with the next command to type; --cfg and --set, if any, are last."""
    config = ['--cfg', cfg] if cfg else []
    config += ['--set', *changes] if changes else []
    return f'next: {python_command(*words, *config)}'


def python_command(script: str, *words: object) -> str:
    """Return a command that runs a script of this repository, or -m and a module, as a person types it in the
    current folder: quoted for a shell, and with the path of this Python where `python` is another or none.
    """
    python, found = Path(sys.executable), shutil.which('python')
    if found and os.path.realpath(Path(found).parent) == os.path.realpath(python.parent):
        python = Path('python')
    elif python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    place = in_repository(script) if script.endswith('.py') else script
    return shlex.join(str(word) for word in [python, place, *words])


def in_repository(path: str) -> Path:
    """Return the path of a file of this repository, from its root, or else the whole one."""
    root = Path(__file__).resolve().parents[1]
    return Path(path) if Path.cwd() == root else root / path
