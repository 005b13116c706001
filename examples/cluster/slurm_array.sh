#!/bin/bash
# Not run here. A Slurm array: every task takes one GPU and one part of the list, without a Ray cluster between them.
#   split -n l/16 -d --additional-suffix=.txt videos.txt part_      # 16 parts of a list with a video a line
#   sbatch --array=0-15 examples/cluster/slurm_array.sh
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=80G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -eu
part=$(printf 'part_%02d' "$SLURM_ARRAY_TASK_ID")
# exec, so that Slurm's signal reaches the command, which then stops; submit the same array again to go on
exec python generate_batch.py --videos "$part.txt" --ckpt_dir "$WEIGHTS" --output_dir "$RUNS/{name}" \
    --report_dir "$RUNS/reports/$part"
