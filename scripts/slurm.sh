#!/usr/bin/env bash
#SBATCH --job-name=trash
#SBATCH --array=0-4
#SBATCH --gres=gpu:8
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=output/slurm-%x-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# Train one fold per array task, on all GPUs of its node:   sbatch scripts/slurm.sh convnext_knet [--set KEY=VALUE ...]
# Five minutes before its time is up, or when it is pre-empted (with SlurmctldParameters=preempt_send_user_signal), a task finishes
# its step or validation, writes a checkpoint and queues itself again; the restarted task resumes from the checkpoint.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ $# -ge 1 ] || { echo 'usage: sbatch scripts/slurm.sh CONFIG [--set KEY=VALUE ...]' >&2; exit 2; }

.venv/bin/torchrun --standalone --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    train.py --cfg "configs/$1.yaml" --fold "${SLURM_ARRAY_TASK_ID:-0}" --resume "${@:2}" &
training=$!
asked=
# signal the ranks themselves, as torchrun would give them 30 seconds; signal torchrun if it has not started them yet
trap 'asked=yes; pkill -USR1 -P $training || kill -TERM $training || true' USR1 TERM
status=0
wait $training || status=$?
while kill -0 $training 2>/dev/null; do # the signal ended `wait`, not the training
    status=0
    wait $training || status=$?
done
if [ -n "$asked" ] && [ $status -ne 0 ]; then
    echo 'slurm.sh: asked to stop; queued again'
    scontrol requeue "$SLURM_JOB_ID" || true # it fails if SLURM has requeued the job already
    exit 75
fi
exit $status
