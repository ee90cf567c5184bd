#!/usr/bin/env bash
# Two machines with eight GPUs each: the same command on both, NODE_RANK 0 on the first and 1 on the second.
# The data is prepared once on each machine; --save must be a folder that both see.
set -euo pipefail
NNODES=2 \
NODE_RANK=${NODE_RANK:?0 on the first machine, 1 on the second} \
MASTER_ADDR=${MASTER_ADDR:?the address of the first machine} \
MASTER_PORT=${MASTER_PORT:-29500} \
NPROC_PER_NODE=8 \
megatron sft \
    --model "${MODEL:-Qwen/Qwen2.5-7B-Instruct}" \
    --dataset "${DATASET:?a jsonl file of conversations}" \
    --packing true \
    --max_length 8192 \
    --micro_batch_size 1 \
    --global_batch_size 16 \
    --max_epochs 1 \
    --lr 1e-5 \
    --min_lr 1e-6 \
    --cross_entropy_loss_fusion true \
    --save "${SAVE:-megatron_output/two_nodes}" \
    --save_safetensors true
