#!/usr/bin/env bash
# Mixtral 8x7B with Megatron-Core's sinkhorn routing (S-BASE, 2202.01169) in place of the auxiliary loss.
# Everything else, and its source, is mixtral_8x7b.sh's.
#
#   --moe-router-load-balancing-type sinkhorn   →  --moe-router sinkhorn
#   --moe-aux-loss-coeff 0, which it requires   →  no --moe-balance: that router has none
#   (weights: the softmax over all experts, not rescaled, for top-2)
#
# In training the assignment is balanced over the micro-batch and sees later tokens; in evaluation it is plain top-2.
set -euo pipefail
# shellcheck source=moe/recipes/launch.sh
source "$(dirname "$0")/launch.sh"

model=(--model-norm rms_norm --rope-theta 1000000 --init-std 0.01 --init-scaled-outputs
    --moe-freq 1 --moe-num-experts 8 --moe-top-k 2 --moe-router sinkhorn --moe-ffn-type swiglu
    --moe-hidden-dim 14336 --no-moe-output-bias --moe-capacity-factor 0 --moe-backend grouped_mm)
training=(--global-batch-size 256 --train-num-samples 10485760000 --epochs 50
    --lr 1e-4 --lr-scheduler cosine --lr-cooldown-end 1e-5 --lr-decay-steps 320000 --warmup 500
    --beta1 0.9 --beta2 0.999 --eps 1e-8 --wd 0.1 --grad-clip-norm 1 --grad-checkpointing)
tiny=(--moe-num-experts 4 --moe-hidden-dim 64)

launch mixtral_8x7b_sinkhorn mixtral_8x7b "$@"
