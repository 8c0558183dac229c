"""Describe the keys of a pydantic model for people, in a table, and for editors, as JSON schema."""

import ast
import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pydantic import BaseModel

from utils.errors import one_line
from utils.yaml_files import show_yaml


def key_table(model: type[BaseModel], leave_out: Sequence[str] = ()) -> str:
    """Return a Markdown table of the keys of a model."""
    lines = ['| key | default | allowed | meaning |', '| --- | --- | --- | --- |']
    schema = model.model_json_schema()
    defaults = model.model_construct().model_dump(mode='json')
    meanings = read_meanings(model)
    for key in [key for key in meanings if key not in leave_out]:
        default = f'`{show_yaml(defaults[key])}`' if key in defaults else 'must be given'
        default = 'those of the home competition' if key == 'classes' else default
        allowed = describe_values(schema['properties'][key], schema)
        meaning = meanings[key].replace('|', '\\|').replace('<', '&lt;')
        lines.append(f'| `{key}` | {default} | {allowed} | {meaning} |')
    return '\n'.join(lines) + '\n'


def read_meanings(model: type[BaseModel]) -> dict[str, str]:
    """Return the text below each key of a model in the file that defines it."""
    (model_class,) = ast.parse(inspect.getsource(model)).body
    return {
        field.target.id: one_line(text.value.value)
        for field, text in pairwise(model_class.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def editor_schema(model: type[BaseModel], *parts: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a YAML file that holds a model, with the meaning of each key; `parts` are the
    models inside it. It is of draft 7, since not every editor knows a later one.
    """
    schema = model.model_json_schema()
    for each in (model, *parts):
        owner = schema if each is model else schema['$defs'][each.__name__]
        for key, meaning in read_meanings(each).items():
            owner['properties'][key]['description'] = meaning
    return {'$schema': 'http://json-schema.org/draft-07/schema#', **_plain(schema)}


def _plain(part: Any) -> Any:
    """Write a part of pydantic's JSON schema in terms of draft 7, without what no editor shows."""
    if isinstance(part, list):
        return [*map(_plain, part)]
    if not isinstance(part, dict):
        return part
    part = {key: value for key, value in part.items() if key not in ('title', 'free', 'format')}
    if '\\w' in part.get('pattern', ''):  # which is ASCII alone in JavaScript
        part.pop('pattern')
    if '$ref' in part:  # the keys there have defaults of their own
        part.pop('default', None)
    if 'prefixItems' in part:
        part |= {'items': part.pop('prefixItems'), 'additionalItems': False}
    names = ('properties', '$defs')  # whose keys are names
    return {
        key: {name: _plain(each) for name, each in value.items()} if key in names
        else value if key == 'default' else _plain(value)
        for key, value in part.items()
    }  # fmt: skip


def describe_values(part: dict[str, Any], schema: dict[str, Any]) -> str:
    """Describe in a few words the values that a part of a JSON schema allows."""
    if 'anyOf' in part:
        return ' or '.join(describe_values(option, schema) for option in part['anyOf'])
    if 'enum' in part or 'const' in part:
        return ', '.join(f'`{value}`' for value in part.get('enum', [part.get('const')]))
    if '$ref' in part:
        return 'keys of their own, below'
    kind = part.get('type')
    if kind == 'array':
        inner = part.get('items') or part['prefixItems'][0]
        low, high = part.get('minItems'), part.get('maxItems')
        count = low if low is not None and low == high else 'a list'
        return f'{count}, each {describe_values(inner, schema)}'
    if kind == 'object':
        value = describe_values(part['additionalProperties'], schema)
        if 'propertyNames' not in part:
            return f'{{name: value}}, each value {value}'
        names = describe_values(part['propertyNames'], schema)
        return f'{{name: value}}, each name one of {names}, each value {value}'
    words = {'integer': 'a whole number', 'number': 'a number', 'boolean': 'true, false', 'null': 'null'}
    signs = {'minimum': 'from', 'exclusiveMinimum': 'above', 'maximum': 'to', 'exclusiveMaximum': 'below'}
    limits = [f'{sign} {part[key]:.12g}' for key, sign in signs.items() if key in part]
    steps = [f'in steps of {part["multipleOf"]}'] if 'multipleOf' in part else []
    word = words.get(kind, 'a path' if part.get('format') == 'path' else 'a word')
    return ' '.join([word, *limits, *steps])
