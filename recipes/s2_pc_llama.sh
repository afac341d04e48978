#!/usr/bin/env bash
# S2 Table 2, Fig. 3 and C.5: Zephyr on pairs that another model wrote, PC_llama, in the first iteration and after PC_off.
# Not as in the paper: answers to AlpacaEval are greedy (it does not say how), and C.5 is another number. The paper judges a random answer
# of PC_llama against PC_off's chosen one, length-controlled; no command makes responses of chosen ones, so here it meets both answers of
# PC_off, and "score" is the share that it wins ("length_matched": among similar lengths). 4 x 80 GB; not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-alignment-handbook/zephyr-7b-sft-full}  # Fig. 3 also: Qwen/Qwen2.5-1.5B after s2_sft.sh, Qwen/Qwen3-4B
LLAMA=${LLAMA:-meta-llama/Meta-Llama-3-8B-Instruct}
JUDGE=${JUDGE:-gpt-4-1106-preview}  # the key from OPENAI_API_KEY
ALPACA=${ALPACA:-alpaca_eval}  # alpaca_eval_gpt4_baseline.json, df_gamed.csv (hub: tatsu-lab/alpaca_eval), alpaca_eval_clf.txt (package)
OUT=${OUT:-out/s2_pc_llama/${MODEL##*/}}
GPUS=${GPUS:-4}

python data/import_responses.py --format ultrafeedback_binarized --data HuggingFaceH4/ultrafeedback_binarized --out "$OUT/off.jsonl"
python generate.py --preset s2 --source off --model "$LLAMA" --prompts "$OUT/off.jsonl" --out "$OUT/llama.jsonl"
python generate.py --preset s2 --model "$MODEL" --prompts "$OUT/off.jsonl" --out "$OUT/on.jsonl"
for name in off llama on; do
  python scorers/pairrm.py --model llm-blender/PairRM-hf --responses "$OUT/$name.jsonl" --out "$OUT/wins_$name.jsonl"
done
python build_pairs.py --scored "$OUT/wins_off.jsonl" --select relabel --on-ratio 0 --out "$OUT/dpo_off.pairs.jsonl"
python build_pairs.py --scored "$OUT/wins_llama.jsonl" --on-ratio 0 --out "$OUT/dpo_llama.pairs.jsonl"
python build_pairs.py --scored "$OUT/wins_on.jsonl" --on-ratio 1 --out "$OUT/dpo_on.pairs.jsonl"
for name in off llama on; do
  torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --preset s2 --model "$MODEL" --pairs "$OUT/dpo_$name.pairs.jsonl" \
    --out "$OUT/dpo_$name"
done
torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --preset s2 --model "$OUT/dpo_off" --pairs "$OUT/dpo_llama.pairs.jsonl" \
  --out "$OUT/dpo_off-llama"

python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" --out "$OUT/alpaca.jsonl"
for model in "$MODEL" "$OUT/dpo_off" "$OUT/dpo_llama" "$OUT/dpo_on" "$OUT/dpo_off-llama"; do
  name=$OUT/eval/${model##*/}
  python generate.py --greedy --model "$model" --prompts "$OUT/alpaca.jsonl" --out "$name.answers.jsonl"
  python scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt" --baseline gpt4_1106_preview \
    --responses "$OUT/alpaca.jsonl" "$name.answers.jsonl" --out "$name.judged.jsonl"
  python evaluate.py winrate --scored "$name.judged.jsonl" --model "$model" --baseline gpt4_1106_preview --lc-data "$ALPACA" \
    --out "$name.winrate.json"
done
# C.5: the first of PC_llama's two answers (a sample depends on seed, prompt and number alone) to the first 805 prompts
python generate.py --preset s2 --n 1 --limit 805 --model "$LLAMA" --prompts "$OUT/off.jsonl" --out "$OUT/c5_llama.jsonl"
python scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt" --limit 805 \
  --responses "$OUT/c5_llama.jsonl" "$OUT/off.jsonl" --out "$OUT/c5_judged.jsonl"
python boundary.py --scored "$OUT/c5_judged.jsonl" --out "$OUT/c5.boundary.json"
python report/figure.py training "$OUT"/dpo_*/metrics.jsonl --out "$OUT/fig3.png"
python report/table.py "$OUT"/eval/*.winrate.json "$OUT"/*.pairs.meta.json "$OUT"/dpo_*/metrics.* "$OUT/c5.boundary.json" \
  --start "${MODEL##*/}" --out "$OUT"
