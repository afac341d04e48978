#!/usr/bin/env bash
# S2 C.1: one epoch on UltraChat, with which Phi-2 (Table 1), Qwen2.5-1.5B and Pythia-6.9B (Table 4) begin; then s2_stages.sh with its model.
# Not as in the paper: it gives neither the chat template nor how turns are masked (here every answer is trained, nothing else).
# Phi-2 and Pythia have no chat template: give a local folder with a chat_template.jinja of your own. 4 x 80 GB; not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B}  # and microsoft/phi-2, EleutherAI/pythia-6.9b
ULTRACHAT=${ULTRACHAT:-ultrachat_200k.jsonl}  # the split train_sft of HuggingFaceH4/ultrachat_200k as JSONL: {"messages": [...]} a line
OUT=${OUT:-out/s2_sft/${MODEL##*/}}
GPUS=${GPUS:-4}

torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --preset s2 --loss sft --model "$MODEL" --pairs "$ULTRACHAT" --out "$OUT"
