#!/usr/bin/env bash
# S2 C.1 and Table 6: one epoch on UltraChat by TRL's SFTTrainer, with which Phi-2 (Table 1), Qwen2.5-1.5B and Pythia-6.9B (Table 4) begin;
# then s2_stages.sh with its model. From the paper: 1 epoch, 2e-5, cosine, warm-up 0.1, 4 GPUs x 4 x 8 = batches of 128, "the setup process
# and training settings of Zephyr-sft-full". Not in the paper: which UltraChat (here Zephyr's, ultrachat_200k, train_sft), the format of a
# turn (here Zephyr's, with the model's own end of text), the longest sequence (here Zephyr's 2,048, the rest is cut off), precision (here
# bfloat16 over float32 weights) and what is trained: here the assistant's turns with their ends; Zephyr's recipe masks nothing.
# In an environment of its own, since TRL wants another transformers. Further arguments go to `trl sft`. 4 x 80 GB; not run at scale, only
# two steps of a small model on a CPU. The same command goes on after the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B}  # and microsoft/phi-2, EleutherAI/pythia-6.9b
ULTRACHAT=${ULTRACHAT:-HuggingFaceH4/ultrachat_200k}
OUT=${OUT:-out/s2_sft/${MODEL##*/}}
GPUS=${GPUS:-4}  # 1, 2, 4, 8, 16 or 32
LAUNCH=${LAUNCH:-fsdp2}  # TRL's accelerate config; single_gpu for one process

if [ ! -e .venv-trl/bin/trl ]; then
  python3 -m venv .venv-trl
  .venv-trl/bin/pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 trl==1.16.0
fi

mkdir -p "$OUT"
cat > "$OUT/data.yaml" <<END
datasets:
  - path: $ULTRACHAT
    split: train_sft
    columns: [messages]  # with its column "prompt" TRL would look for a completion
END
# What is between generation and endgeneration is trained.
cat > "$OUT/zephyr.jinja" <<'END'
{%- for message in messages %}
  {{- '<|' + message.role + '|>\n' }}
  {%- if message.role == 'assistant' %}
    {%- generation %}
      {{- message.content + eos_token }}
    {%- endgeneration %}
  {%- else %}
    {{- message.content + eos_token }}
  {%- endif %}
  {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|assistant|>\n' }}
{%- endif %}
END
# the last complete checkpoint; the trainer writes its state last
last=$(find "$OUT" -path '*/checkpoint-*/trainer_state.json' -printf '%h\n' | sort -V | tail -n 1)

.venv-trl/bin/trl sft --config "$OUT/data.yaml" --accelerate_config "$LAUNCH" --num_processes "$GPUS" \
  --model_name_or_path "$MODEL" --output_dir "$OUT" --chat_template_path "$OUT/zephyr.jinja" \
  --assistant_only_loss true --max_length 2048 --num_train_epochs 1 --learning_rate 2e-5 --lr_scheduler_type cosine --warmup_steps 0.1 \
  --per_device_train_batch_size 4 --gradient_accumulation_steps $((32 / GPUS)) --dataset_num_proc 8 --report_to none \
  --save_steps 200 --save_total_limit 1 ${last:+--resume_from_checkpoint "$last"} "$@"
