"""docs/competitions.md: every competition.yaml loads, every command is one that its script takes."""

import re
import shlex
from pathlib import Path

import pytest
from entry_points import parse_command
from test_docs import blocks_of

import config
from config import read_competition

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs/competitions.md'
BLOCKS = blocks_of(PAGE)
YAMLS = [text for language, text in BLOCKS if language == 'yaml']
COMMANDS = [line for language, text in BLOCKS if language == 'bash' for line in text.splitlines()]


@pytest.mark.parametrize('text', YAMLS, ids=lambda text: text.splitlines()[0])
def test_each_block_is_a_competition(text, tmp_path):
    (tmp_path / 'competition.yaml').write_text(text)
    competition = read_competition(tmp_path)
    assert competition.classes and re.match(r'# input/\w+/competition.yaml\n', text)
    if 'submission' in text:
        assert competition.rle is not None and competition.score_size == 'own'


def test_the_first_is_the_home_competition(tmp_path):
    (tmp_path / 'competition.yaml').write_text(YAMLS[0])
    assert read_competition(tmp_path) == config.HOME and len(YAMLS) == 5


@pytest.mark.parametrize('line', [line for line in COMMANDS if 'python ' in line])
def test_each_command_is_one_that_its_script_takes(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(re.sub(r'^for .*; do |; done$', '', line).replace('$fold', '0'), comments=True)
    words = [word for text in words for word in (['data_root=input/a'] if text == '$set' else [text])]
    parse_command(words[1:], monkeypatch)


def test_figures_are_filled_in():
    assert 'FILL IN' not in PAGE.read_text()
