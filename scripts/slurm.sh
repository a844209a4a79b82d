#!/bin/bash
# A mixture of experts on 2 nodes of 8 GPUs under Slurm, which may end it at any time: it saves, is put into the queue
# again, and goes on. Submit: sbatch scripts/slurm.sh
#SBATCH --job-name=moe-160m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
#SBATCH --signal=B:USR1@300

set -uo pipefail

# srun starts the ranks itself: no torchrun. It passes a signal on to every rank.
srun --kill-on-bad-exit=1 python -m open_lm.main \
  --model open_lm_160m --moe-freq 2 --moe-num-experts 8 --moe-top-k 2 \
  --fsdp --fsdp-amp --precision amp_bfloat16 --torchcompile --accum-freq 4 --batch-size 8 \
  --dataset-manifest "s3://BUCKET/corpus/manifest.jsonl" --multiple-data-passes \
  --train-num-samples 1000000000 --epochs 20 --lr 5e-4 --warmup 2000 --grad-clip-norm 1 --wd 0.1 \
  --logs /shared/logs --name moe-160m --resume latest &
ranks=$!

# 300 s before the time limit, or on pre-emption: the ranks save the same step and end with status 0
stopped=
trap 'stopped=1; kill -USR1 "$ranks"' USR1 TERM
wait "$ranks"
status=$?
while kill -0 "$ranks" 2>/dev/null; do # a signal has ended the wait, not the ranks
  wait "$ranks"
  status=$?
done

# what failed would fail again: only a run that was stopped by the signal, and has saved, comes back; 3: it has saved,
# and not all is copied to --remote-sync yet
if [ -n "$stopped" ] && { [ "$status" -eq 0 ] || [ "$status" -eq 3 ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
