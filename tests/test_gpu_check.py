"""The GPU check: each item at a tiny size on the CPU, and what becomes of one that crashes or hangs."""

import json
import shutil
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from gpu_parts import fake_parts, without_gpu

from models import SegModel
from networks.blocks import FAST_BLOCKS
from tools.bench.steps import new_model, plain_model
from tools.gpu import __main__ as check
from tools.gpu.results import ERROR, FAILED, MET, Report, Result, ResultFiles
from tools.gpu.runner import ItemRunner, Options, parts_of
from tools.gpu.workload import ShortTrainer, encoder_config, with_data
from utils.errors import BadInput, CheckFailed

ROOT = Path(__file__).resolve().parents[1]


# --- the runner, with the parts of gpu_parts.py -----------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """Run a fake item; return its results, and the seconds that it took."""
    runner, options = ItemRunner(fake_parts, tmp_path / 'log.txt'), Options('cpu', True, tmp_path)

    def run_item(item: int, seconds: float) -> tuple[list[Result], float]:
        results = []
        return results, runner.run(item, options, seconds, results.append)

    return run_item


def test_a_part_that_crashes_costs_only_itself(run):
    results, _ = run(1, 60)
    found = [(result.what, result.met, result.note) for result in results]
    assert found == [
        ('a ratio', MET, 'as | it must be'),
        ('before the crash', '', ''),
        ('two', ERROR, 'ValueError: no such kernel'),
        ('three', ERROR, 'killed by SIGKILL'),
        ('a ratio', MET, 'as | it must be'),
    ]


def test_an_item_that_hangs_is_killed_with_what_it_started(run):
    results, seconds = run(2, 3)
    (child, error) = results
    assert error.what == 'one' and error.met == ERROR and error.note == 'killed at its deadline'
    assert seconds < 20
    for _ in range(50):  # until its own parent, the system's first process, has noticed
        stat = Path(f'/proc/{child.value:.0f}/stat')
        if not stat.exists() or stat.read_text().split()[2] == 'Z':
            break
        time.sleep(0.1)
    else:
        pytest.fail('the child of a killed part still runs')


def test_an_item_that_cannot_even_start_is_an_error(run):
    ((result,), _) = run(9, 60)
    assert result.met == ERROR and result.note == 'MemoryError'


def test_results_are_written_line_by_line_and_as_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, 'parts_of', fake_parts)
    with pytest.raises(CheckFailed, match='2 of 7 results'):
        check.command(['--device', 'cpu', '--items', '1', '3', '--out', str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    assert [line['item'] for line in lines] == [0, 1, 1, 1, 1, 1, 3]
    table = (tmp_path / 'table.md').read_text()
    assert '| 1 | a ratio | 0.5 | ≤ 1 | yes | as / it must be |' in table
    assert '4 met, 0 not met, 2 errors' in table and '| **3** | **' in table
    assert '== item 1: two' in (tmp_path / 'log.txt').read_text()


def test_items_that_no_time_is_left_for_are_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, 'parts_of', fake_parts)
    runner = ItemRunner(fake_parts, tmp_path / 'log.txt')
    files = ResultFiles(tmp_path, {number: item.title for number, item in check.ITEMS.items()})
    check.run_items(runner, Options('cpu', True, tmp_path), files, [3], 0)
    assert [result.met for result in files.results] == [ERROR, ERROR]
    assert 'not run: no time was left' in (tmp_path / 'table.md').read_text()


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, 'parts_of', without_gpu)
    with pytest.raises(BadInput, match='found cuda, but torch sees no GPU; expected cpu'):
        check.command(['--out', str(tmp_path)])


def test_data_without_annotations_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r'train_all.json: no such file'):
        check.read_arguments(['--data', str(tmp_path)])


def test_data_without_test_json_stays_as_it_is(shapes, tmp_path):
    root = tmp_path / 'data'
    root.mkdir()
    shutil.copy(shapes / 'train_all.json', root)
    options = Options('cpu', True, tmp_path, root)
    cfg = with_data(encoder_config('resnet18', options), options, 'run')
    assert cfg.data_root == root and [path.name for path in root.iterdir()] == ['train_all.json']
    assert (root / 'train_all.json').read_bytes() == (shapes / 'train_all.json').read_bytes()


def test_not_a_number_meets_no_limit():
    results = []
    report = Report(1, results.append)
    report.at_most('a', float('nan'), 1)
    report.at_least('b', float('nan'), 1)
    report.at_most('c', 1, 1)
    report.holds('d', False)
    assert [result.met for result in results] == [FAILED, FAILED, MET, FAILED]


# --- the items ---------------------------------------------------------------------------------------------


# the slow test has the others
QUICK = {
    0: ['machine'],
    1: ['peaks'],
    2: ['demo'],
    4: ['fp32'],
    6: ['demo'],
    8: ['prediction'],
    9: ['loader', 'last.pt'],
    11: ['fpn_resnet101'],
}


@pytest.mark.parametrize('item', QUICK)
def test_parts_of_items(item, shapes, tmp_path):
    options, results = Options('cpu', True, tmp_path, shapes), []
    parts = parts_of(item, options)
    for name in QUICK[item]:
        parts[name](options, Report(item, results.append))
    assert results and not [result for result in results if result.is_bad]


def test_each_item_has_parts():
    from tools.gpu.parts import PARTS

    assert [*PARTS] == [*check.ITEMS]


def test_two_runs_that_differ_are_found(tmp_path, monkeypatch):
    from tools.gpu import determinism

    seeds = count()
    monkeypatch.setattr(determinism, 'seed_everything', lambda *_: torch.manual_seed(next(seeds)))
    monkeypatch.setattr(determinism, 'TERMS', ['ce'])
    cfg = determinism.loss_config('ce', Options('cpu', True, tmp_path))
    monkeypatch.setattr(determinism, 'build_model', lambda cfg, device: SegModel(cfg, load_weights=False))
    results = []
    determinism.run_all(['ce'], lambda *_: cfg, Options('cpu', True, tmp_path), Report(3, results.append))
    assert [result.met for result in results] == [FAILED]


@pytest.mark.slow
def test_a_resumed_run_that_differs_is_found(shapes, tmp_path, monkeypatch):
    from tools.gpu import determinism

    monkeypatch.setattr(ShortTrainer, 'restore_rank', lambda *_: None)  # its random numbers are lost
    results = []
    determinism.resume('off', 'fp32', Options('cpu', True, tmp_path, shapes), Report(4, results.append))
    assert results[0].met == FAILED


def test_the_other_way_has_the_blocks_of_timm(tmp_path):
    cfg = encoder_config('convnext_atto.d2_in1k', Options('cpu', True, tmp_path))
    fast = set(FAST_BLOCKS.values())
    for build, expected in ((new_model, True), (plain_model, False)):
        encoder = build(cfg, torch.device('cpu')).encoder
        assert any(type(module) in fast for module in encoder.modules()) == expected


def test_random_points_are_the_same_on_every_device():
    from tools.gpu.numerics import HostRandom

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with HostRandom():
        found = torch.rand(3, device='meta')
        assert found.device.type == 'meta'
    torch.manual_seed(0)
    with HostRandom():
        assert torch.equal(torch.rand(3, device='cpu'), expected)


@pytest.mark.slow
def test_whole_check(tmp_path):
    words = ['-m', 'tools.gpu', '--device', 'cpu', '--tiny', '--out', str(tmp_path)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ', 0 not met, 0 errors' in done.stdout
