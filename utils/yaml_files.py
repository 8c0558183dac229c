"""Read YAML files of plain values strictly, and show values as YAML in messages."""

import difflib
from pathlib import Path
from typing import Any

import yaml

from utils.errors import BadInput, one_line
from utils.files import refuse_device


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values. Raises BadInput."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise BadInput(f'{path}: found {type(values).__name__}, expected lines of "key: value"')
    return values


class StrictLoader(yaml.SafeLoader):
    """Read plain YAML; refuse tags (!!name), and a key that stands twice: the second would win silently."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        tag = getattr(self.peek_event(), 'tag', None)
        if tag is not None:
            raise yaml.YAMLError(f'has a tag ({tag[:60]}), which is not taken')
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f'key {twice[:60]!r} stands twice')
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Read plain values from a YAML file; an empty one gives {}. Raises BadInput."""
    try:
        refuse_device(path)
        values = parse_yaml(path.read_text(encoding='utf-8'), where=str(path))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob('*.yaml')], n=1)
        hint = f'; did you mean {path.with_name(near[0])}.yaml?' if near else ''
        raise BadInput(f'{path}: no such file{hint}') from None
    except IsADirectoryError:
        raise BadInput(f'{path}: is a folder, expected a YAML file') from None
    except UnicodeDecodeError as error:
        raise BadInput(f'{path}: cannot be read: {one_line(error)}; save it as UTF-8') from None
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {one_line(error)}') from None
    return {} if values is None else values


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML into plain values. Raises BadInput, which names their source: `where`."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f'line {mark.line + 1}, column {mark.column + 1}: ' if mark else ''
        fault = one_line(error.problem or error.context)[:300]
        raise BadInput(f'{where}: {place}not YAML: {fault}') from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f'{where}: not YAML: {one_line(error)[:300]}') from None


def replace_keys(text: str, values: dict[str, Any]) -> str:
    """Replace keys of YAML lines of "key: value", or add them at the end; the rest and its comments stay."""
    lines = text.splitlines()
    for key, value in values.items():
        new = dump_yaml({key: value}).splitlines()
        start = next((n for n, line in enumerate(lines) if line.startswith(f'{key}:')), len(lines))
        end = start + 1
        for n in range(start + 1, len(lines)):
            if lines[n][:1].strip() and lines[n][0] not in '-}]#':
                break
            if lines[n].strip() and lines[n][0] != '#':  # what stands in front of the next key belongs there
                end = n + 1
        lines[start:end] = new
    changed = '\n'.join([*lines, ''])
    before = parse_yaml(text, 'before') or {}
    try:
        if parse_yaml(changed, 'after') == before | values:
            return changed
    except BadInput:
        pass  # a layout that lines do not tell
    return dump_yaml(before | values)


def dump_yaml(values: dict[str, Any]) -> str:
    """Return values as lines of YAML."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def show_yaml(value: object) -> str:
    """Return a value as YAML on one line, shortened."""
    plain = [*value] if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000, allow_unicode=True)
    text = text.removesuffix('...\n').strip()
    return text if len(text) <= 160 else f'{text[:150]} ...'
