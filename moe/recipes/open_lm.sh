#!/usr/bin/env bash
# open_lm's table of MoE models (open_lm, MOE.md): 41m, 87m, 160m, 410m, 830m, with 8 or 32 experts, 20 billion tokens.
#
#   MODEL=160m EXPERTS=32 DATA="a/manifest.jsonl b/manifest.jsonl" bash moe/recipes/open_lm.sh \
#       --train-data-mix-weights 0.725 0.275
#
# Its flags are ours, with one difference:
#   --moe-loss-weight 0.1   →  --moe-loss-weight 0.4: with --accum-freq 4 it sums the balance loss over the four
#                              micro-batches, here it is their mean
#   --batch-size 8, 8 GPUs  →  --global-batch-size 64: does not change with NPROC
#   --epochs 50 of 10B      →  --epochs 2 of 10B: the tables are of 20 billion tokens, the printed command of 500
# Its nodes: one up to 160m, two for 410m, four for 830m; batches of those runs are not published.
set -euo pipefail
# shellcheck source=moe/recipes/launch.sh
source "$(dirname "$0")/launch.sh"
DATA_KEY=${DATA_KEY:-json}

model=(--moe-freq 2 --moe-num-experts "${EXPERTS:-8}" --moe-top-k 2 --moe-capacity-factor 1.25 --moe-loss-weight 0.4
    --model-norm gain_only_layer_norm)
training=(--global-batch-size 64 --accum-freq 4 --train-num-samples 10000000000 --epochs 2
    --lr 5e-4 --lr-scheduler cosine --lr-cooldown-end 0.00001 --warmup 200 --wd 0.1 --beta2 0.95 --grad-clip-norm 1
    --workers 2 --seed 124 --log-every-n-steps 20)
tiny=(--moe-num-experts 4)

size=open_lm_${MODEL:-41m}
for word in "$@"; do
    [[ $word != --tiny ]] || size=open_lm
done
launch "open_lm-${MODEL:-41m}-${EXPERTS:-8}experts" "$size" "$@"
