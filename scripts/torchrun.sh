#!/bin/bash
# On each of 2 nodes of 8 GPUs: HEAD=HOST_OF_THE_FIRST JOB=ANY_ID bash scripts/torchrun.sh
# A rank that dies is started again with all others, up to 3 times, and the run goes on from its newest state.
# After --, as torchrun would take --logs for its own flag.
set -euo pipefail

torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:29400" --rdzv-id "$JOB" \
  -m -- open_lm.main \
  --model open_lm_160m --moe-freq 2 --moe-num-experts 8 --moe-top-k 2 \
  --fsdp --fsdp-amp --precision amp_bfloat16 --torchcompile --accum-freq 4 --batch-size 8 \
  --dataset-manifest "s3://BUCKET/corpus/manifest.jsonl" --multiple-data-passes \
  --train-num-samples 1000000000 --epochs 20 --lr 5e-4 --warmup 2000 --grad-clip-norm 1 --wd 0.1 \
  --logs /shared/logs --name moe-160m --resume latest
