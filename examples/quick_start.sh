#!/usr/bin/env bash
# The quick start of Megatron-SWIFT's documentation, as its users type it: two 80 GB GPUs, Qwen2.5-7B-Instruct, about ten minutes there.
# A model and data sets that lie in folders of these names are taken from there; MODEL and EXTRA change the command for a smaller machine.
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
NAME=${MODEL##*/}

# Hugging Face to Megatron. Not needed any more: `megatron sft --model "$MODEL"` trains from the Hugging Face folder directly.
CUDA_VISIBLE_DEVICES=0 \
swift export \
    --model "$MODEL" \
    --to_mcore true \
    --torch_dtype bfloat16 \
    --output_dir "$NAME-mcore"

# shellcheck disable=SC2086  (EXTRA holds several flags)
NPROC_PER_NODE=2 \
CUDA_VISIBLE_DEVICES=0,1 \
megatron sft \
    --load "$NAME-mcore" \
    --dataset 'AI-ModelScope/alpaca-gpt4-data-zh#500' \
              'AI-ModelScope/alpaca-gpt4-data-en#500' \
              'swift/self-cognition#500' \
    --tensor_model_parallel_size 2 \
    --micro_batch_size 4 \
    --global_batch_size 16 \
    --recompute_granularity selective \
    --train_iters 100 \
    --eval_iters 5 \
    --finetune true \
    --cross_entropy_loss_fusion true \
    --lr 1e-5 \
    --lr_warmup_iters 10 \
    --min_lr 1e-6 \
    --save "megatron_output/$NAME" \
    --save_interval 100 \
    --max_length 2048 \
    --system 'You are a helpful assistant.' \
    --num_workers 4 \
    --no_save_optim true \
    --no_save_rng true \
    --dataset_num_proc 4 \
    --model_author swift \
    --model_name swift-robot \
    ${EXTRA:-}

run=$(ls -td "megatron_output/$NAME"/v*-* | grep -v -- '-hf$' | head -1)

CUDA_VISIBLE_DEVICES=0 \
swift export \
    --mcore_model "$run" \
    --to_hf true \
    --torch_dtype bfloat16 \
    --output_dir "$run-hf"

CUDA_VISIBLE_DEVICES=0 \
swift infer \
    --model "$run-hf" \
    --stream true \
    --temperature 0 \
    --max_new_tokens 2048
