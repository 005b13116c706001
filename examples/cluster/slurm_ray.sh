#!/bin/bash
# Not run here. One Ray cluster in an allocation of whole nodes, and one batch on all of their GPUs.
#   sbatch --nodes=8 examples/cluster/slurm_ray.sh
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
set -eu
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # since Slurm 22.05 srun does not take it from the job
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=6379
srun --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --port="$port" --block &
sleep 20
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
    srun --nodes="$others" --ntasks="$others" --exclude="$head" ray start --address="$head:$port" --block &
fi
sleep 20
exec srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" python generate_batch.py --address auto \
    --workers $((8 * SLURM_JOB_NUM_NODES)) --videos videos.csv --ckpt_dir "$WEIGHTS" --output_dir "$RUNS/{name}"
