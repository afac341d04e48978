#!/usr/bin/env bash
# S1 Fig. 6: the model itself, SimpleMix, and SimpleMix with the better 0.4 of the off-policy pairs and as many on-policy ones.
# Not as in the paper: it does not say from which prompts the on-policy pairs come (here from those whose off-policy pair was left out
# first) and compares sets of unequal sizes; "same_size" is SimpleMix with as many pairs as "high". One node of 8 x 80 GB; not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
REWARD=${REWARD:-Skywork/Skywork-Reward-Gemma-2-27B-v0.2}
JUDGE=${JUDGE:-gpt-4-1106-preview}  # the key from OPENAI_API_KEY
ALPACA=${ALPACA:-alpaca_eval}  # alpaca_eval_gpt4_baseline.json, df_gamed.csv (hub: tatsu-lab/alpaca_eval), alpaca_eval_clf.txt (package)
OUT=${OUT:-out/s1_fig6}
GPUS=${GPUS:-8}

python data/import_responses.py --format ultrafeedback_binarized --data HuggingFaceH4/ultrafeedback_binarized --out "$OUT/off.jsonl"
python generate.py --model "$MODEL" --prompts "$OUT/off.jsonl" --out "$OUT/on.jsonl"
python score.py --model "$REWARD" --responses "$OUT/on.jsonl" "$OUT/off.jsonl" --out "$OUT/scored.jsonl"
python build_pairs.py --scored "$OUT/scored.jsonl" --on-ratio 0.5 --out "$OUT/dpo_mix.pairs.jsonl"
python build_pairs.py --scored "$OUT/scored.jsonl" --on-ratio 0.5 --filter quality:0.4 --out "$OUT/dpo_high.pairs.jsonl"
total=$(wc -l < "$OUT/dpo_high.pairs.jsonl")
python build_pairs.py --scored "$OUT/scored.jsonl" --on-ratio 0.5 --total "$total" \
  --out "$OUT/dpo_same_size.pairs.jsonl"
for name in mix high same_size; do
  torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --model "$MODEL" --pairs "$OUT/dpo_$name.pairs.jsonl" \
    --out "$OUT/dpo_$name"
done

python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" --out "$OUT/alpaca.jsonl"
for model in "$MODEL" "$OUT/dpo_mix" "$OUT/dpo_high" "$OUT/dpo_same_size"; do
  name=$OUT/eval/${model##*/}
  python generate.py --greedy --model "$model" --prompts "$OUT/alpaca.jsonl" --out "$name.answers.jsonl"
  python scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt" --baseline gpt4_1106_preview \
    --responses "$OUT/alpaca.jsonl" "$name.answers.jsonl" --out "$name.judged.jsonl"
  python evaluate.py winrate --scored "$name.judged.jsonl" --model "$model" --baseline gpt4_1106_preview --lc-data "$ALPACA" \
    --out "$name.winrate.json"
done
python report/figure.py settings "$OUT"/eval/*.winrate.json --out "$OUT/fig6.png"
python report/table.py "$OUT"/eval/*.winrate.json "$OUT"/*.pairs.meta.json "$OUT"/*/metrics.* --start "${MODEL##*/}" --out "$OUT"
