#!/usr/bin/env bash
# sbatch examples/slurm.sh my_run.yaml ...: train on whole nodes, and go on after the time limit or a preemption.
# The folder of the checkpoints (args.save in the YAML; here $SAVE) must be shared by the nodes.
#SBATCH --job-name=sat_ext
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
# the newest run with a checkpoint; a requeued job goes on with it
latest=$(find "${SAVE:-runs}" -mindepth 2 -maxdepth 2 -name latest -printf '%T@ %h\n' 2>/dev/null | sort -n | tail -n 1 | cut -d ' ' -f 2-)
load=()
[ -z "$latest" ] || load=(--load "$latest")
# one task is one rank: no launcher between Slurm's SIGTERM and the ranks, which would kill them after its own limit
srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python train_video.py "$@"' \
    rank --base "$@" "${load[@]}"
status=$?
# 143: SIGTERM came, and a checkpoint is saved
[ "$status" -ne 143 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
