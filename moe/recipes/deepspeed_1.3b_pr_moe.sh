#!/usr/bin/env bash
# DeepSpeed's PR-MoE (2201.05596): GPT-3 1.3B, ten MoE layers of 64 experts, then two of 128, each beside an MLP for
# every token; 31 billion weights for the quality of the 52 billion of deepspeed_1.3b_moe128.sh.
# Source: Megatron-DeepSpeed, examples_deepspeed/MoE/ds_pretrain_gpt_1.3B_PR-MoE64or128.sh.
#
#   --num-experts "64 64 64 64 64 64 64 64 64 64 128 128"   →  --moe-num-experts, the same list
#   --mlp-type residual                                     →  --moe-residual
#
# All else as in deepspeed_1.3b_moe128.sh.
set -euo pipefail
# shellcheck source=moe/recipes/launch.sh
source "$(dirname "$0")/launch.sh"

model=(--model-norm default_layer_norm --ffn-type gelu_tanh --ffn-bias --attn-bias
    --positional-embedding-type learned --dropout 0.1 --attn-dropout 0.1 --init-std 0.014 --init-scaled-outputs
    --moe-layer-pattern "([0]+[1])*12" --moe-num-experts 64 64 64 64 64 64 64 64 64 64 128 128 --moe-residual
    --moe-top-k 1 --moe-ffn-type gelu --moe-expert-bias
    --no-moe-output-bias --moe-balance first_choice --moe-loss-weight 0.12
    --moe-capacity-factor 1.0 --moe-eval-capacity-factor 1.0 --moe-min-capacity 4 --moe-capacity-rounding up
    --moe-drop-policy random)
training=(--global-batch-size 512 --train-num-samples 6000000000 --epochs 50
    --lr 1.2e-4 --lr-scheduler cosine --lr-cooldown-end 1e-6 --warmup 358
    --beta1 0.9 --beta2 0.95 --eps 1e-8 --wd 0.1 --grad-clip-norm 1 --grad-checkpointing)
tiny=(--moe-layer-pattern "([0]+[1])*2" --moe-num-experts 4 8)

launch deepspeed_1.3b_pr_moe deepspeed_1.3b "$@"
