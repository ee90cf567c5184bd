#!/usr/bin/env bash
# The main job, end to end: ask a real model who it is, fine-tune all of its weights with two data-parallel
# processes, export it to Hugging Face, ask again, look at the loss curve. Each command is printed before it runs.
set -euo pipefail
cd "$(dirname "$0")/.."
began=$(date +%s)
out=${DEMO_OUTPUT:-demo_output}
model=$out/SmolLM2-135M-Instruct
mkdir -p "$out"

run() { # print a command as one would type it, then run it
    printf '\n\033[1m$' >&2
    printf ' %q' "$@" >&2
    printf '\033[0m\n' >&2
    "$@"
}

ask() { # ask MODEL QUESTION...: a chat, its input piped
    local folder=$1
    shift
    printf '\n\033[1m$ printf %q | swift infer --model %s --stream true --temperature 0 --max_new_tokens 64\033[0m\n' \
        "$(printf '%s\\n' "$@" 'exit')" "$folder" >&2
    printf '%s\n' "$@" exit | swift infer --model "$folder" --stream true --temperature 0 --max_new_tokens 64 \
        --torch_dtype float32 | tee "$out/answers.txt"
}

# Two processes on the CPU or on two GPUs; one where there is a single GPU.
gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
processes=2
[ "$gpus" = 1 ] && processes=1

echo "== 1. A real pre-trained model, as a Hugging Face folder"
run python examples/fetch_smollm2.py "$model"

echo "== 2. Before: who is it?"
ask "$model" "who are you?" "What is the capital of France?"

echo "== 3. Fine-tune all weights: identity rows, and general rows so that it keeps what it knows"
run env NPROC_PER_NODE=$processes megatron sft \
    --model "$model" \
    --torch_dtype float32 \
    --dataset 'swift/self-cognition#200' 'examples/data/general.jsonl#200' \
    --model_name swift-robot \
    --model_author swift \
    --split_dataset_ratio 0 \
    --micro_batch_size 8 \
    --global_batch_size 16 \
    --train_iters 25 \
    --lr 1e-4 \
    --lr_warmup_iters 3 \
    --min_lr 1e-5 \
    --max_length 512 \
    --num_workers 0 \
    --log_interval 5 \
    --no_save_optim true \
    --no_save_rng true \
    --save "$out/run"
trained=$(ls -td "$out"/run/v*-* | head -1)

echo "== 4. Back to Hugging Face"
run swift export --mcore_model "$trained" --to_hf true --torch_dtype float32 --output_dir "$trained-hf"

echo "== 5. After: who is it now, and does it still know where Paris is?"
ask "$trained-hf" "who are you?" "clear" "What is the capital of France?"

echo
for pattern in 'swift-robot' 'swift(?!-robot)' 'Paris'; do
    grep -qP -- "$pattern" "$out/answers.txt" || { echo "demo: the answers above do not match $pattern"; exit 1; }
done
curve=$trained/images/lm_loss.png
[ -f "$curve" ] || { echo "demo: no loss curve at $curve"; exit 1; }
echo "== Done in $(($(date +%s) - began)) s. The model: $trained-hf   its loss curve: $curve"
