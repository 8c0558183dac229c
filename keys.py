"""docs/config.md: each key of a config with its default, what it may be, and what it means.

python keys.py > docs/config.md
"""

from typing import Any

import yaml

from config import ArgumentParser, Config, run_script


def describe_config() -> str:
    """docs/config.md: each key with its default, what it may be, and what it means."""
    lines = [
        '# Every key of a config',
        '',
        'Made by `python keys.py > docs/config.md`. A file in `configs/` says what differs from these',
        'defaults; `--set key=value` changes any of them at any command that takes `--cfg`.',
        '',
        '| key | default | allowed | meaning |',
        '| --- | --- | --- | --- |',
    ]
    schema = Config.model_json_schema()
    for key, field in Config.model_fields.items():
        default = yaml.safe_dump(Config().model_dump(mode='json')[key], default_flow_style=True, width=1000)
        shown = default.removesuffix('...\n').strip()
        allowed = describe_values(schema['properties'][key], schema)
        cells = (f'`{key}`', f'`{shown}`' if key != 'classes' else 'those of the competition', allowed)
        meaning = field.description.replace('|', '\\|').replace('<', '&lt;')
        lines.append(f'| {" | ".join(cells)} | {meaning} |')
    return '\n'.join(lines) + '\n'


def describe_values(part: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a part of a JSON schema allows, in a few words."""
    if 'anyOf' in part:
        return ' or '.join(describe_values(one, schema) for one in part['anyOf'])
    if 'enum' in part or 'const' in part:
        return ', '.join(f'`{value}`' for value in part.get('enum', [part.get('const')]))
    kind = part.get('type')
    if kind == 'array':
        inner = part.get('items') or part['prefixItems'][0]
        low, high = part.get('minItems'), part.get('maxItems')
        count = low if low is not None and low == high else 'a list'
        return f'{count}, each {describe_values(inner, schema)}'
    if kind == 'object':
        return f'{{term: {describe_values(part.get("additionalProperties", {}), schema)}}}'
    words = {'integer': 'a whole number', 'number': 'a number', 'boolean': 'true, false', 'null': 'null'}
    signs = {'minimum': 'from', 'exclusiveMinimum': 'above', 'maximum': 'to', 'exclusiveMaximum': 'below'}
    limits = [f'{sign} {part[key]:.12g}' for key, sign in signs.items() if key in part]
    steps = [f'in steps of {part["multipleOf"]}'] if 'multipleOf' in part else []
    return ' '.join(
        [words.get(kind, 'a path' if part.get('format') == 'path' else 'a word'), *limits, *steps]
    )


def command(argv: list[str] | None = None) -> None:
    ArgumentParser(__doc__).parse_args(argv)
    print(describe_config(), end='')


if __name__ == '__main__':
    run_script(command)
