#!/usr/bin/env bash
# S1 Appendix A: the sweep over beta and the highest learning rate; the paper went on with 0.1 and 5e-7.
# Not as in the paper: it does not say on which model and pairs it swept (here UltraFeedback's, off-policy) nor by what it chose (here
# AlpacaEval 2). The reference's log-probabilities are computed once for all 15 trainings. One node of 8 x 80 GB; not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
REWARD=${REWARD:-Skywork/Skywork-Reward-Gemma-2-27B-v0.2}
JUDGE=${JUDGE:-gpt-4-1106-preview}  # the key from OPENAI_API_KEY
ALPACA=${ALPACA:-alpaca_eval}  # alpaca_eval_gpt4_baseline.json, df_gamed.csv (hub: tatsu-lab/alpaca_eval), alpaca_eval_clf.txt (package)
OUT=${OUT:-out/s1_appendix_a}
GPUS=${GPUS:-8}

python data/import_responses.py --format ultrafeedback_binarized --data HuggingFaceH4/ultrafeedback_binarized --out "$OUT/off.jsonl"
python score.py --model "$REWARD" --responses "$OUT/off.jsonl" --out "$OUT/scored.jsonl"
python build_pairs.py --scored "$OUT/scored.jsonl" --on-ratio 0 --out "$OUT/pairs.jsonl"
python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" --out "$OUT/alpaca.jsonl"

for beta in 0.01 0.1 0.5 1 5; do
  for lr in 5e-7 1e-6 5e-6; do
    model=$OUT/beta_${beta}_lr_$lr
    torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --model "$MODEL" --pairs "$OUT/pairs.jsonl" --beta "$beta" --lr "$lr" \
      --out "$model"
    python generate.py --greedy --model "$model" --prompts "$OUT/alpaca.jsonl" --out "$model.answers.jsonl"
    python scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt" --baseline gpt4_1106_preview \
      --responses "$OUT/alpaca.jsonl" "$model.answers.jsonl" --out "$model.judged.jsonl"
    python evaluate.py winrate --scored "$model.judged.jsonl" --model "$model" --baseline gpt4_1106_preview --lc-data "$ALPACA" \
      --out "$model.winrate.json"
  done
done
python report/table.py "$OUT"/*.winrate.json "$OUT"/*/metrics.* --out "$OUT"
