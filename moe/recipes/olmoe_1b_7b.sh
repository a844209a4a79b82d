#!/usr/bin/env bash
# OLMoE-1B-7B (2409.02060): 64 small experts in every layer, top-8, dropless; 1.3 of 6.9 billion weights per token.
# Source: allenai/OLMoE, configs/OLMoE-1B-7B-0924.yml.
#
#   d_model 2048, n_heads 16, n_layers 16, max_sequence_length 4096, embedding_size 50304, weight_tying false
#                                                →  olmoe_1b_7b.json
#   layer_norm_type rms, attention_layer_norm    →  --model-norm rms_norm --qk-norm (over all heads together)
#   init_fn normal, init_std 0.02                →  --init-std 0.02 (theirs is cut off at three deviations)
#   block_type moe                               →  --moe-freq 1
#   moe_num_experts 64, moe_top_k 8              →  --moe-num-experts 64 --moe-top-k 8 (weights not rescaled)
#   mlp_ratio 1, activation_type swiglu: 2048 for gate and value together
#                                                →  --moe-hidden-dim 1024 --moe-ffn-type swiglu
#   include_bias false                           →  --no-moe-output-bias
#   moe_dropless true                            →  --moe-capacity-factor 0
#   moe_loss_weight 0.01, a mean over layers     →  --moe-loss-weight 0.01
#   moe_zloss_weight 0.001, which their MegaBlocks divides by layers, tokens and k (allenai/OLMoE issue 39)
#                                                →  --moe-z-loss-weight 0.000125 = 0.001 / 8
#   global_train_batch_size 1024                 →  --global-batch-size 1024
#   learning_rate 4e-4, alpha_f 0.1              →  --lr 4e-4 --lr-cooldown-end 4e-5
#   t_warmup 10485760000, t_max 5e12 tokens      →  --warmup 2500 steps, --epochs 200 of 25 billion tokens
#   betas 0.9 0.95, eps 1e-8, weight_decay 0.1, max_grad_norm 1.0
#                                                →  --beta1 --beta2 --eps --wd --grad-clip-norm
#   decay_norm_and_bias true                     →  not here: norms are never decayed
# Their last annealing to zero is a run of its own and not in this one.
set -euo pipefail
# shellcheck source=moe/recipes/launch.sh
source "$(dirname "$0")/launch.sh"

model=(--model-norm rms_norm --qk-norm --init-std 0.02
    --moe-freq 1 --moe-num-experts 64 --moe-top-k 8 --moe-ffn-type swiglu --moe-hidden-dim 1024 --no-moe-output-bias
    --moe-capacity-factor 0 --moe-balance aux --moe-loss-weight 0.01 --moe-z-loss-weight 0.000125)
training=(--global-batch-size 1024 --train-num-samples 25000000000 --epochs 200
    --lr 4e-4 --lr-scheduler cosine --lr-cooldown-end 4e-5 --warmup 2500
    --beta1 0.9 --beta2 0.95 --eps 1e-8 --wd 0.1 --grad-clip-norm 1 --seed 6198)
tiny=(--moe-num-experts 8 --moe-top-k 4 --moe-hidden-dim 16)

launch olmoe_1b_7b olmoe_1b_7b "$@"
