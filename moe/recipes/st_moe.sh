#!/usr/bin/env bash
# ST-MoE (2202.08906) as a decoder: the widths of its ST-MoE-L, whose 4.1 billion weights are an encoder and a decoder
# of 27 layers each, every fourth with 32 experts. Routing as lucidrains/st-moe-pytorch 0.1.8 has it
# (st_moe_pytorch.py, README.md), in its arguments' names:
#
#   dim 1024, 16 heads of 64, dense width 2816, 27 layers, T5's 32128 ids   →  st_moe.json; rotary positions are ours
#   every fourth layer                        →  --moe-layers 3 7 11 15 19 23
#   num_experts 32, gating_top_n 2            →  --moe-num-experts 32 --moe-top-k 2 --moe-router threshold
#   threshold_train 0.2, threshold_eval 0.2   →  --moe-threshold 0.2
#   capacity_factor_train 1.25, _eval 2.0, of n/E places in each sequence, not of k*n/E; at least 4
#                                             →  --moe-capacity-factor 0.625 --moe-eval-capacity-factor 1.0
#                                                --moe-capacity-per sequence --moe-min-capacity 4
#   (first choices before second ones)        →  --moe-drop-policy choice
#   straight_through_dispatch_tensor          →  --moe-straight-through
#   balance_loss_coef 1e-2, summed over 6 layers by the user
#                                             →  --moe-balance first_choice --moe-loss-weight 0.06
#   router_z_loss_coef 1e-3, the same         →  --moe-z-loss-weight 0.006
#   expert_hidden_mult, Expert (GEGLU with biases)
#                                             →  --moe-hidden-dim 2816 --moe-ffn-type geglu --moe-expert-bias
#   SparseMoEBlock add_ff_after (its default; add_ff_before: --moe-dense-before)
#                                             →  --moe-dense-after, --ffn-type gemma_geglu
#   RMSNorm                                   →  --model-norm rms_norm
#
# Not the same: the balance loss is of the micro-batch, theirs of each sequence; GEGLU's multiplicative bias (2816 weights
# of an expert or dense FFN) is not here. ST-MoE trains with Adafactor; optimizer, batch and schedule below are ours.
set -euo pipefail
# shellcheck source=moe/recipes/launch.sh
source "$(dirname "$0")/launch.sh"

model=(--model-norm rms_norm --ffn-type gemma_geglu
    --moe-layers 3 7 11 15 19 23 --moe-num-experts 32 --moe-top-k 2 --moe-router threshold --moe-threshold 0.2
    --moe-capacity-factor 0.625 --moe-eval-capacity-factor 1.0 --moe-capacity-per sequence --moe-min-capacity 4
    --moe-drop-policy choice --moe-straight-through --moe-balance first_choice --moe-loss-weight 0.06
    --moe-z-loss-weight 0.006 --moe-ffn-type geglu --moe-hidden-dim 2816 --moe-expert-bias --no-moe-output-bias
    --moe-dense-after --moe-init scaled)
training=(--global-batch-size 512 --train-num-samples 5000000000 --epochs 100
    --lr 3e-4 --lr-scheduler cosine --lr-cooldown-end 3e-5 --warmup 10000
    --beta1 0.9 --beta2 0.95 --eps 1e-8 --wd 0.1 --grad-clip-norm 1)
tiny=(--moe-layers 3 --moe-num-experts 4 --moe-hidden-dim 64)

launch st_moe st_moe "$@"
