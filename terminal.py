"""What a person sees: help that names each option's default. Imports nothing of ours."""

import argparse


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
    lines = [f'    {line.strip()}' for line in text.splitlines() if f'python {prog} ' in line]
    return '\n'.join(['examples:', *lines]) if lines else ''
