#!/usr/bin/env bash
#SBATCH --job-name=trash
#SBATCH --array=0-4
#SBATCH --gres=gpu:8
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=output/slurm-%x-%A-%a.log
#SBATCH --requeue
# One fold an array task, all GPUs of its node:   sbatch scripts/slurm.sh convnext_knet
# A task that is started again goes on from its last checkpoint.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ $# -eq 1 ] || { echo 'usage: sbatch scripts/slurm.sh CONFIG' >&2; exit 2; }

.venv/bin/torchrun --standalone --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    train.py --cfg "configs/$1.yaml" --fold "${SLURM_ARRAY_TASK_ID:-0}" --resume
