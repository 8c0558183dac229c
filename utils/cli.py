"""The command line that all scripts share: options, help, the next command, and how a script ends."""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import (
    BAD_INPUT,
    CHECK_FAILED,
    DONE,
    INTERRUPTED,
    NO_ROOM,
    BadInput,
    CheckFailed,
    Interrupted,
    one_line,
)
from utils.log import say
from utils.signals import interrupt_on_signals


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose help keeps the docstring's layout, shows defaults and
    examples.
    """

    def __init__(self, doc: str, examples: str = '', **kwargs: Any) -> None:
        """Of the lines of `examples`, those that call this command are shown."""
        super().__init__(description=doc, formatter_class=HelpFormatter, **kwargs)
        self.epilog = examples_of(self.prog, examples)

    def add_subparsers(self, **kwargs: Any) -> argparse._SubParsersAction:
        """Each command's examples are those lines of the script's own docstring that call it."""
        parser_class = partial(ArgumentParser, examples=self.description)
        return super().add_subparsers(**{'metavar': 'COMMAND', 'parser_class': parser_class, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f'{self.prog}: error: {one_line(message)}; see --help\n')


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--cfg and --set, the same in every script that takes a config; not required where it is there for the
    classes and the data root of another data set alone.
    """
    another = "of another data set: its classes and data_root; by default the competition's"
    what = 'a file of configs/' if required else another
    parser.add_argument('--cfg', required=required, type=Path, metavar='YAML', help=what)
    parser.add_argument(
        '--set', nargs='+', action='extend', default=[], metavar='KEY=VALUE', help='changes of the config'
    )


def parse_early(parse: Callable[[], object]) -> None:
    """Read the arguments and the config before torch is imported, so that --help and a typo answer at once.

    A script that needs torch calls it between its light imports and its heavy ones:

        if __name__ == '__main__':
            parse_early(read_arguments)

        import torch
    """

    def check() -> None:
        parse()

    status = exit_status(check)
    if status != DONE:
        sys.exit(status)


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main and exit with its status: 0 done, 1 a check failed, 2 bad input, 75 interrupted and
    resumable. SIGTERM and SIGUSR1 interrupt as Ctrl-C does.
    """
    sys.exit(exit_status(main))


def exit_status(main: Callable[[], int | None]) -> int:
    """Call main and return its exit status; an error that a person can mend is one line on standard error."""
    interrupt_on_signals()
    script = Path(sys.argv[0]).name
    try:
        return main() or DONE
    except (BadInput, CheckFailed) as error:
        say(f'{script}: error: {one_line(error)}', sys.stderr)
        return BAD_INPUT if isinstance(error, BadInput) else CHECK_FAILED
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f'{script}: {one_line(stop) or "interrupted"}', file=sys.stderr)
        return INTERRUPTED
    except OSError as error:  # of a library's own files
        if error.errno not in NO_ROOM:
            raise
        print(f'{script}: {one_line(error)}; make room, and go on', file=sys.stderr)
        return INTERRUPTED


MAX_SEED = 2**32 - 1  # of an option; NumPy takes no negative one


def next_line(*words: object, cfg: Path | None = None, changes: Sequence[str] = ()) -> str:
    """The next command to type, quoted for a shell; --cfg and --set at its end, where they were given."""
    given = ['--cfg', cfg] if cfg else []
    given += ['--set', *changes] if changes else []
    return f'next: python {shlex.join(str(word) for word in [*words, *given])}'


def parse_fold(text: str) -> int | None:
    """Convert the text of --fold: a number from 0, -1 (trained on everything), or None for 'all'."""
    if text == 'all':
        return None
    if not re.fullmatch(r'-1|\d{1,3}', text, re.ASCII):
        raise argparse.ArgumentTypeError(f'found {text[:40]!r}, expected a fold from 0, -1, or all')
    return int(text)


def at_least(least: int, most: int = 10_000) -> Callable[[str], int]:
    """The type of an option that is a whole number within these."""

    def parse(text: str) -> int:
        if not re.fullmatch(r'\d{1,12}', text, re.ASCII) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f'found {text[:40]!r}, expected a whole number from {least} to {most}'
            )
        return int(text)

    return parse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of a description, and says of each option what it is by default, or that it is
    required. Where the default is None, the option's own help has to say what happens then.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ''
        if not action.option_strings or isinstance(action, argparse._HelpAction) or 'default' in text:
            return text
        if action.required:
            return f'{text}; required'
        if action.default is None:
            return text
        value = action.default
        if isinstance(value, bool):
            value = 'on' if value else 'off'
        elif isinstance(value, list | tuple):
            value = ' '.join(str(part) for part in value) or 'none'
        return f'{text}; default {value}'


def examples_of(prog: str, text: str) -> str:
    """The lines of a text that call `prog`, as the end of its help; '' where there are none."""
    lines = [
        f'    {line.strip()}'
        for line in text.splitlines()
        if f'python {prog.removeprefix("python ")} ' in line
    ]
    return '\n'.join(['examples:', *lines]) if lines else ''
