#!/usr/bin/env bash
# A small model in the style of DeepSeek-V3 (2412.19437): latent attention, sigmoid scores in groups, a shared expert,
# balance by bias. The options are its own (deepseek-ai/DeepSeek-V3, inference/configs/config_671B.json, and the
# report); widths and counts are smaller, with its shape of attention heads:
#
#   q_lora_rank 1536, kv_lora_rank 512, qk_nope_head_dim 128, qk_rope_head_dim 64, v_head_dim 128, vocab_size 129280
#                                                  →  deepseek_v3_small.json: ranks 384 and 256, the rest the same
#   RMSNorm 1e-6; rope in interleaved pairs        →  norm_eps there; --model-norm rms_norm,
#                                                     --positional-embedding-type llama_rotary
#   weights drawn with 0.006 (4.2)                 →  --init-std 0.006
#   n_dense_layers 3 of 61                         →  --moe-freq 1 --moe-first-dense 1 of 16
#   n_routed_experts 256, moe_inter_dim 2048       →  --moe-num-experts 64 --moe-hidden-dim 512
#   n_shared_experts 1                             →  --moe-shared-hidden-dim 512
#   n_activated_experts 8                          →  --moe-top-k 8
#   n_expert_groups 8, n_limited_groups 4          →  --moe-num-groups 8 --moe-top-groups 4
#   score_func sigmoid, route_scale 2.5, weights rescaled to sum to one
#                                                  →  --moe-score sigmoid --moe-weight-scale 2.5 --moe-normalize-weights
#   bias update speed 0.001 (for 14.3 of 14.8T tokens, then 0); sequence-wise loss, alpha 0.0001 per layer
#                                                  →  --moe-balance bias sequence --moe-bias-rate 0.001,
#                                                     --moe-loss-weight 0.0015 = 0.0001 * 15 MoE layers
#   lr 2.2e-4 after 2000 steps, constant for 10 of 14.8T tokens, then falling to 2.2e-5
#                                                  →  --lr-scheduler const-cooldown --epochs-cooldown 6 of 20 (linear here)
#   AdamW 0.9, 0.95, weight decay 0.1, clip 1.0    →  --beta1 --beta2 --wd --grad-clip-norm
#   multi-token prediction                         →  not here
#
# The batch (V3: 3072 growing to 15360 sequences) and the number of tokens are ours, for this size.
set -euo pipefail
# shellcheck source=moe/recipes/launch.sh
source "$(dirname "$0")/launch.sh"

model=(--model-norm rms_norm --positional-embedding-type llama_rotary --init-std 0.006
    --moe-freq 1 --moe-first-dense 1 --moe-num-experts 64 --moe-top-k 8 --moe-num-groups 8 --moe-top-groups 4
    --moe-score sigmoid --moe-normalize-weights --moe-weight-scale 2.5 --moe-ffn-type swiglu --moe-hidden-dim 512
    --moe-shared-hidden-dim 512 --no-moe-output-bias --moe-capacity-factor 0
    --moe-balance bias sequence --moe-bias-rate 0.001 --moe-loss-weight 0.0015)
training=(--global-batch-size 512 --train-num-samples 5000000000 --epochs 20
    --lr 2.2e-4 --lr-scheduler const-cooldown --epochs-cooldown 6 --lr-cooldown-end 2.2e-5 --warmup 2000
    --beta1 0.9 --beta2 0.95 --eps 1e-8 --wd 0.1 --grad-clip-norm 1)
tiny=(--moe-num-experts 8 --moe-top-k 4 --moe-num-groups 4 --moe-top-groups 2 --moe-hidden-dim 16
    --moe-shared-hidden-dim 16 --epochs-cooldown 1)

launch deepseek_v3_small deepseek_v3_small "$@"
