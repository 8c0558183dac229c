"""scripts/*.sh: wrong arguments; what submit.sh checks, compares, hands in and keeps (the kaggle client is a
stand-in here).
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import write_csv

from config import HOME
from data.coco import read_coco

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / '.venv').exists(), reason='scripts/setup.sh makes .venv')


def submit(csv: Path, shapes: Path, folder: Path, **more: str) -> subprocess.CompletedProcess:
    env = os.environ | {'DATA': str(shapes), 'KEPT': str(folder / 'kept')} | more
    words = ['bash', str(ROOT / 'scripts' / 'submit.sh'), str(csv)]
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False)


def test_submission_is_checked_compared_handed_in_and_kept(shapes, tmp_path):
    names = [photo.file_name for photo in read_coco(shapes, 'test', HOME).photos]
    masks = {name: np.zeros((256, 256), np.uint8) for name in names}
    csv = write_csv(tmp_path / 'a.csv', masks)
    done = submit(csv, shapes, tmp_path)
    assert done.returncode == 0 and 'not handed in' in done.stdout and not (tmp_path / 'kept').exists()

    client = tmp_path / 'bin' / 'kaggle'
    client.parent.mkdir()
    client.write_text('#!/bin/sh\necho "handed $@"\n')
    client.chmod(0o755)
    more = {'PATH': f'{client.parent}:{os.environ["PATH"]}', 'COMPETITION': 'trash', 'MESSAGE': 'first'}
    done = submit(csv, shapes, tmp_path, **more)
    assert f'handed competitions submit -c trash -f {csv} -m first' in done.stdout, done
    (kept,) = (tmp_path / 'kept').iterdir()
    assert kept.read_bytes() == csv.read_bytes()

    done = submit(csv, shapes, tmp_path, **more)
    assert (
        done.returncode == 2 and 'is what was submitted last' in done.stderr and 'handed' not in done.stdout
    )
    masks[names[0]][:128] = 3
    done = submit(write_csv(csv, masks), shapes, tmp_path)
    assert done.returncode == 0 and 'of the pixels differ' in done.stdout

    csv.write_text('no submission')
    done = submit(csv, shapes, tmp_path, **more)
    assert done.returncode == 2 and 'handed' not in done.stdout and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ('script', 'words', 'more', 'message'),
    [
        ('gpu.sh', ['nosuch'], {}, 'nosuch: holds no wheels'),
        ('gpu.sh', ['', 'nosuch'], {}, 'nosuch/train_all.json: no such file'),
        ('gpu_wheels.sh', [], {}, 'usage'),
        ('kaggle_offline.sh', [], {}, 'usage'),
        ('kaggle_offline.sh', ['nosuch'], {}, 'nosuch: no such folder'),
        ('run.sh', [], {}, 'usage'),
        ('run.sh', ['demo', 'nosuch'], {}, 'configs/nosuch.yaml: no such file'),
        ('run.sh', ['demo'], {'SCHEDULE': 'quarter'}, 'SCHEDULE=quarter: expected full, half or pretrain'),
        ('compare.sh', [], {}, 'the following arguments are required: BASE'),
        ('compare.sh', ['demo', 'epohs=3', '--seeds', '0', '1'], {}, "did you mean 'epochs'?"),
        ('submit.sh', ['a', 'b'], {}, 'usage'),
        ('trash481.sh', [], {}, 'usage'),
        ('trash481.sh', ['nosuch'], {}, 'nosuch/train_all.json: no such file'),
    ],
)
def test_wrong_arguments_end_in_one_line_before_anything_is_done(script, words, more, message):
    command = ['bash', str(ROOT / 'scripts' / script), *words]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr, done
    assert done.stdout == '' and len(done.stderr.splitlines()) == 1


RANKS = """#!/usr/bin/env bash
echo "$@" >torchrun.txt
bash -c 'trap "echo asked >rank.txt; exit 75" USR1
sleep 0.5; touch started; for _ in {1..200}; do sleep 0.05; done' &
wait $! || exit 1
"""


@pytest.mark.parametrize('asked', [True, False])
def test_slurm_asks_the_ranks_to_stop_and_queues_the_task_again(tmp_path, asked):
    """Before the time is up, SLURM sends USR1 to the shell alone; torchrun is not asked, but its ranks are.
    A training that fails by itself is not queued again.
    """
    for name, text in (
        ('.venv/bin/torchrun', RANKS if asked else '#!/usr/bin/env bash\nexit 3\n'),
        ('bin/scontrol', '#!/usr/bin/env bash\necho "$@" >scontrol.txt\n'),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    env = os.environ | {'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}', 'SLURM_SUBMIT_DIR': str(tmp_path)}
    env |= {'SLURM_JOB_ID': '7', 'SLURM_ARRAY_TASK_ID': '3', 'SLURM_GPUS_ON_NODE': '2'}
    words = ['bash', ROOT / 'scripts/slurm.sh', 'demo', '--set', 'epochs=2']
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
        while asked and not (tmp_path / 'started').exists():
            assert process.poll() is None
            time.sleep(0.01)
        if asked:
            process.send_signal(signal.SIGUSR1)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == (75 if asked else 3)
    assert ('queued again' in output) == asked == (tmp_path / 'scontrol.txt').exists()
    if asked:
        assert (tmp_path / 'rank.txt').exists()
        assert (tmp_path / 'scontrol.txt').read_text() == 'requeue 7\n'
        called = (tmp_path / 'torchrun.txt').read_text()
        assert (
            '--nproc-per-node=2 train.py --cfg configs/demo.yaml --fold 3 --resume --set epochs=2' in called
        )
