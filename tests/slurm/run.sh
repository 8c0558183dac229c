#!/usr/bin/env bash
# Runs scripts/slurm.sh on a real SLURM on this one machine: a training is pre-empted by a more important job, queues itself again, goes
# on, and ends with the files, to the bit, of a training that nobody disturbed.
# As root, on Debian or Ubuntu; all of it but the packages stays in FOLDER.
#     bash tests/slurm/run.sh [FOLDER]
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(realpath -m "${1:-/tmp/slurm-test}")
command -v slurmctld munged >/dev/null || { apt-get update -qq; apt-get install -y -qq --no-install-recommends slurm-wlm munge; }
[ ! -e "$work" ] || { echo "$work: is there already; remove it, or give another folder" >&2; exit 2; }
mkdir -p "$work"/{state,spool,output}
host=$(hostname -s)

cat >"$work/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
SchedulerParameters=batch_sched_delay=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
OverTimeLimit=1
KillWait=5
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=low Nodes=$host Default=YES PriorityTier=1 GraceTime=120 MaxTime=INFINITE State=UP
PartitionName=high Nodes=$host PriorityTier=10 MaxTime=INFINITE State=UP
END
export SLURM_CONF=$work/slurm.conf
stop() { for name in slurmd slurmctld munged; do [ ! -f "$work/$name.pid" ] || kill "$(cat "$work/$name.pid")" || true; done; }
trap stop EXIT
(umask 077 && head -c 1024 /dev/urandom >"$work/munge.key")
munged --force --socket="$work/munge.socket" --key-file="$work/munge.key" --pid-file="$work/munged.pid" \
    --log-file="$work/munged.log" --seed-file="$work/munge.seed"
slurmctld
slurmd -N "$host"
for _ in {1..60}; do ! sinfo -h -o %T 2>/dev/null | grep -q idle || break; sleep 1; done
sinfo

cd "$root"
.venv/bin/python prepare.py demo --out "$work/data" --train 32 --test 4
set=(--set "data_root=$work/data" "cache_dir=$work/cache" epochs=16 workers=1 image_size=128 crop_size=128 device=cpu folds=2)
export OMP_NUM_THREADS=1
.venv/bin/python train.py --cfg configs/demo.yaml --fold 0 "${set[@]}" "output_dir=$work/alone"

submit() { sbatch --parsable --chdir="$root" --exclusive --gres=none --cpus-per-task=1 --output="$work/$1.log" "${@:2}"; }
ended() { while squeue -h -j "$1" 2>/dev/null | grep -q .; do sleep 1; done; }
same() { # the run $1 was stopped once, went on, and has the files of the run that was left alone
    cat "$work/$1.log"
    grep -q 'SIGUSR1' "$work/$1.log"
    grep -q 'queued again' "$work/$1.log"
    grep -q 'resumed after' "$work/$1/demo/fold0/log.txt"
    cmp "$work/alone/demo/fold0/metrics.csv" "$work/$1/demo/fold0/metrics.csv"
    .venv/bin/python - "$work/alone/demo/fold0" "$work/$1/demo/fold0" <<'END'
import sys
from pathlib import Path

import torch

for name in ('last.pt', 'best.pt'):
    one, two = (torch.load(Path(folder) / name, weights_only=True) for folder in sys.argv[1:])
    assert one['epoch'] == two['epoch'] and one['score'] == two['score'], (one['score'], two['score'])
    assert all(torch.equal(value, two['model'][key]) for key, value in one['model'].items())
    print(f'{name}: the weights of the run that was left alone, to the bit, and its score {one["score"]}')
END
}

job=$(submit preempted --partition=low --array=0 scripts/slurm.sh demo "${set[@]}" "output_dir=$work/preempted")
until [ -f "$work/preempted/demo/fold0/metrics.csv" ]; do sleep 0.5; done
ended "$(submit important --partition=high --wrap 'sleep 5')"
scontrol release "$job" 2>/dev/null || true
ended "$job"
same preempted
