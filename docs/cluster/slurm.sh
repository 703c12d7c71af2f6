#!/bin/bash
# One run on several machines under SLURM:  sbatch docs/cluster/slurm.sh TEXTS RUN [more of nextword pretrain's options …]
# RUN lies where every machine sees it. Prepare a large text first, once:  nextword prepare TEXTS --out SHARDS
#SBATCH --job-name=nextword
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120

set -euo pipefail
texts=$1 run=$2
shift 2
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Each machine starts its own processes. --resume begins where there is nothing yet, so a job that was cut off is submitted
# again as it is; SLURM's signal two minutes before the end is answered with a checkpoint.
exec srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
  -m nextword pretrain "$texts" --out "$run" --resume "$@"
