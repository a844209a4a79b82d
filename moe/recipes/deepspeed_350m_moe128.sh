#!/usr/bin/env bash
# DeepSpeed's standard MoE (2201.05596): GPT-3 350M with 128 experts in every second layer, top-1, 13 billion weights.
# Source: Megatron-DeepSpeed, examples_deepspeed/MoE/ds_pretrain_gpt_350M_MoE128.sh, with the defaults of
# megatron/arguments.py and of deepspeed/moe/layer.py where it says nothing.
#
#   --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048, learned positions, tied
#     embeddings, GPT-2's 50257 ids filled up to 50304          →  deepspeed_350m.json
#   (LayerNorm, tanh GELU, biases, dropout 0.1)                 →  --model-norm --ffn-type --ffn-bias --attn-bias --dropout
#   --init-method-std 0.014                                     →  --init-std 0.014 --init-scaled-outputs
#   --num-experts 128, --expert-interval 2 (layers 2, 4, … of 24, counted from 1)
#                                                               →  --moe-num-experts 128 --moe-layer-pattern "([0]+[1])*12"
#   --topk 1 (default)                                          →  --moe-top-k 1
#   --moe-loss-coeff 0.01, summed over 12 MoE layers            →  --moe-balance first_choice --moe-loss-weight 0.12
#   --moe-train-capacity-factor 1.0, --moe-eval-… 1.0           →  --moe-capacity-factor 1.0 --moe-eval-capacity-factor 1.0
#   --moe-min-capacity 4, rounded up                            →  --moe-min-capacity 4 --moe-capacity-rounding up
#   use_rts (default: who is dropped is drawn by lot)           →  --moe-drop-policy random
#   --lr 2e-4 --min-lr 2e-6, cosine over 300 billion tokens     →  --lr --lr-cooldown-end, --epochs 50 of 6 billion
#   --lr-warmup-tokens 375000000                                →  --warmup 715 steps of 256 * 2048 tokens
#   --weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95        →  --wd --grad-clip-norm --beta2
#   --checkpoint-activations                                    →  --grad-checkpointing
#   --fp16                                                      →  bf16 here
#   --create-moe-param-group, --moe-expert-parallel-size        →  not needed; not yet
#
# Not the same: the router is drawn with --init-std too (there: torch's default), and DeepSpeed leaves out the bias
# of an expert's second product although the weights are there; here it acts.
set -euo pipefail
# shellcheck source=moe/recipes/launch.sh
source "$(dirname "$0")/launch.sh"

model=(--model-norm default_layer_norm --ffn-type gelu_tanh --ffn-bias --attn-bias
    --positional-embedding-type learned --dropout 0.1 --attn-dropout 0.1 --init-std 0.014 --init-scaled-outputs
    --moe-layer-pattern "([0]+[1])*12" --moe-num-experts 128 --moe-top-k 1 --moe-ffn-type gelu --moe-expert-bias
    --no-moe-output-bias --moe-balance first_choice --moe-loss-weight 0.12
    --moe-capacity-factor 1.0 --moe-eval-capacity-factor 1.0 --moe-min-capacity 4 --moe-capacity-rounding up
    --moe-drop-policy random)
training=(--global-batch-size 256 --train-num-samples 6000000000 --epochs 50
    --lr 2e-4 --lr-scheduler cosine --lr-cooldown-end 2e-6 --warmup 715
    --beta1 0.9 --beta2 0.95 --eps 1e-8 --wd 0.1 --grad-clip-norm 1 --grad-checkpointing)
tiny=(--moe-layer-pattern "([0]+[1])*2" --moe-num-experts 4)

launch deepspeed_350m_moe128 deepspeed_350m "$@"
