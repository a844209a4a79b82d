#!/usr/bin/env bash
# Mixtral 8x7B (2401.04088) as Megatron-Core trains it: top-2 of 8, auxiliary loss, grouped GEMM, dropless.
# Source: Megatron-LM, examples/mixtral/train_mixtral_8x7b_distributed.sh; the same command stands in
# megatron/core/transformer/moe/README.md with a batch of 128 and without --rotary-base.
#
#   --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length 4096, --num-query-groups 8,
#     --untie-embeddings-and-output-weights, vocabulary 32000    →  mixtral_8x7b.json
#   --normalization RMSNorm, --rotary-base 1000000              →  --model-norm rms_norm, --rope-theta
#   --init-method-std 0.01                                      →  --init-std 0.01 --init-scaled-outputs
#   --num-experts 8 --moe-router-topk 2                         →  --moe-num-experts 8 --moe-top-k 2
#   --ffn-hidden-size 14336 --swiglu                            →  --moe-hidden-dim 14336 --moe-ffn-type swiglu
#   --disable-bias-linear                                       →  --no-moe-output-bias
#   (softmax over the chosen: their default)                    →  --moe-score-order after
#   (no capacity factor: dropless)                              →  --moe-capacity-factor 0
#   --moe-router-load-balancing-type aux_loss                   →  --moe-balance aux
#   --moe-aux-loss-coeff 1e-2, summed over 32 layers            →  --moe-loss-weight 0.32, a mean over layers
#   --moe-grouped-gemm                                          →  --moe-backend grouped_mm
#   --global-batch-size 256, --train-iters 500000, a checkpoint every 10000
#                                                               →  --epochs 50 of 10000 * 256 * 4096 tokens
#   --lr 1e-4 --min-lr 1e-5 --lr-decay-iters 320000 --lr-warmup-iters 500
#                                                               →  --lr --lr-cooldown-end --lr-decay-steps --warmup
#   --weight-decay 0.1 --clip-grad 1.0, Adam's defaults there   →  --wd --grad-clip-norm, --beta2 0.999
#   --use-distributed-optimizer --overlap-…                     →  --fsdp
#   --moe-token-dispatcher-type, pipeline-, expert-parallel     →  not yet
set -euo pipefail
# shellcheck source=moe/recipes/launch.sh
source "$(dirname "$0")/launch.sh"

model=(--model-norm rms_norm --rope-theta 1000000 --init-std 0.01 --init-scaled-outputs
    --moe-freq 1 --moe-num-experts 8 --moe-top-k 2 --moe-score-order after --moe-ffn-type swiglu
    --moe-hidden-dim 14336 --no-moe-output-bias --moe-capacity-factor 0
    --moe-balance aux --moe-loss-weight 0.32 --moe-backend grouped_mm)
training=(--global-batch-size 256 --train-num-samples 10485760000 --epochs 50
    --lr 1e-4 --lr-scheduler cosine --lr-cooldown-end 1e-5 --lr-decay-steps 320000 --warmup 500
    --beta1 0.9 --beta2 0.999 --eps 1e-8 --wd 0.1 --grad-clip-norm 1 --grad-checkpointing)
tiny=(--moe-num-experts 4 --moe-hidden-dim 64)

launch mixtral_8x7b mixtral_8x7b "$@"
