#!/usr/bin/env bash
# A small model in the style of Qwen3-30B-A3B (2505.09388): half its width and expert width, a third of its layers,
# half its experts. The options are its own, from its config.json as transformers' Qwen3MoeConfig reads it:
#
#   num_key_value_heads 4, head_dim 128 (heads together twice the width), vocab_size 151936
#                                                →  qwen3_moe_small.json
#   rms_norm_eps 1e-6; q_norm, k_norm per head   →  norm_eps there; --model-norm rms_norm --qk-norm-per-head
#   rope_theta 1000000, initializer_range 0.02   →  --rope-theta 1000000 --init-std 0.02
#   decoder_sparse_step 1                        →  --moe-freq 1
#   num_experts 128, moe_intermediate_size 768   →  --moe-num-experts 64 --moe-hidden-dim 384 (half of each)
#   num_experts_per_tok 8, norm_topk_prob true   →  --moe-top-k 8 --moe-normalize-weights
#   hidden_act silu                              →  --moe-ffn-type swiglu
#   router_aux_loss_coef 0.001, of a loss that is k when balanced (transformers)
#                                                →  --moe-loss-weight 0.008
#   counts of the global batch (the report's section 2; 2501.11873)
#                                                →  --moe-balance global
#
# The report does not give the learning rate, the batch or the schedule: those below are ours, and not tuned.
set -euo pipefail
# shellcheck source=moe/recipes/launch.sh
source "$(dirname "$0")/launch.sh"

model=(--model-norm rms_norm --qk-norm-per-head --rope-theta 1000000 --init-std 0.02
    --moe-freq 1 --moe-num-experts 64 --moe-top-k 8 --moe-normalize-weights --moe-ffn-type swiglu
    --moe-hidden-dim 384 --no-moe-output-bias --moe-capacity-factor 0 --moe-balance global --moe-loss-weight 0.008)
training=(--global-batch-size 256 --train-num-samples 5000000000 --epochs 20
    --lr 4e-4 --lr-scheduler cosine --lr-cooldown-end 4e-5 --warmup 2000
    --beta1 0.9 --beta2 0.95 --eps 1e-8 --wd 0.1 --grad-clip-norm 1)
tiny=(--moe-num-experts 8 --moe-top-k 4 --moe-hidden-dim 16)

launch qwen3_moe_small qwen3_moe_small "$@"
