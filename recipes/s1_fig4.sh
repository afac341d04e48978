#!/usr/bin/env bash
# S1 Fig. 4: the share of on-policy pairs, the total number fixed, with error bars, for one model.
# Not as in the paper: it prints neither its shares (here those of its code) nor where its error bars come from (here three seeds, of the
# mixture and of the training; the figure draws their sd). One node of 8 x 80 GB, 27 trainings; not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}  # and allenai/Llama-3.1-Tulu-3-8B-SFT
REWARD=${REWARD:-Skywork/Skywork-Reward-Gemma-2-27B-v0.2}
JUDGE=${JUDGE:-gpt-4-1106-preview}  # the key from OPENAI_API_KEY
ALPACA=${ALPACA:-alpaca_eval}  # alpaca_eval_gpt4_baseline.json, df_gamed.csv (hub: tatsu-lab/alpaca_eval), alpaca_eval_clf.txt (package)
OUT=${OUT:-out/s1_fig4/${MODEL##*/}}
GPUS=${GPUS:-8}

python data/import_responses.py --format ultrafeedback_binarized --data HuggingFaceH4/ultrafeedback_binarized --out "$OUT/off.jsonl"
python generate.py --model "$MODEL" --prompts "$OUT/off.jsonl" --out "$OUT/on.jsonl"
python score.py --model "$REWARD" --responses "$OUT/on.jsonl" "$OUT/off.jsonl" --out "$OUT/scored.jsonl"
python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" --out "$OUT/alpaca.jsonl"

for share in 0 0.2 0.3 0.4 0.5 0.6 0.7 0.8 1; do  # every share of the same prompts, so the total is the same too
  for seed in 0 1 2; do
    model=$OUT/dpo_${share}_seed$seed
    python build_pairs.py --scored "$OUT/scored.jsonl" --on-ratio "$share" --seed "$seed" --out "$model.pairs.jsonl"
    torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --model "$MODEL" --pairs "$model.pairs.jsonl" --seed "$seed" \
      --out "$model"
    python generate.py --greedy --model "$model" --prompts "$OUT/alpaca.jsonl" --out "$model.answers.jsonl"
    python scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt" --baseline gpt4_1106_preview \
      --responses "$OUT/alpaca.jsonl" "$model.answers.jsonl" --out "$model.judged.jsonl"
    python evaluate.py winrate --scored "$model.judged.jsonl" --model "$model" --baseline gpt4_1106_preview --lc-data "$ALPACA" \
      --out "$model.winrate.json"
  done
done
python report/figure.py ratio "$OUT"/*.winrate.json "$OUT"/*.pairs.meta.json --out "$OUT/fig4.png"
python report/table.py "$OUT"/*.winrate.json "$OUT"/*.pairs.meta.json "$OUT"/*/metrics.* --out "$OUT"
