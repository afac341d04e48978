#!/usr/bin/env bash
# S3 Appendix B.1: the prompts of Tulu 3's UltraFeedback on which a reward model and a judge order the two answers differently, trained on
# in the order of either. Not as in the paper: it names neither judge nor its prompt and prints no results (10,000 prompts differed, the
# reward model's order did better). Three seeds; 8 x 80 GB, and 41,635 questions to the judge; not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-allenai/Llama-3.1-Tulu-3-8B-SFT}
REWARD=${REWARD:-Skywork/Skywork-Reward-Gemma-2-27B-v0.2}
LABELER=${LABELER:-gpt-4o-mini}     # the judge that labels
JUDGE=${JUDGE:-gpt-4-1106-preview}  # the judge of AlpacaEval 2; the key of both from OPENAI_API_KEY
ALPACA=${ALPACA:-alpaca_eval}  # alpaca_eval_gpt4_baseline.json, df_gamed.csv (hub: tatsu-lab/alpaca_eval), alpaca_eval_clf.txt (package)
OUT=${OUT:-out/s3_b1}
GPUS=${GPUS:-8}

python data/import_responses.py --format ultrafeedback_binarized --data allenai/tulu-3-ultrafeedback-cleaned-on-policy-8b \
  --split train --out "$OUT/off.jsonl"
python score.py --model "$REWARD" --responses "$OUT/off.jsonl" --out "$OUT/rewards.jsonl"
python scorers/judge.py --model "$LABELER" --responses "$OUT/rewards.jsonl" --out "$OUT/both.jsonl"  # prints their agreement
python recipes/s3_pairs.py --scored "$OUT/both.jsonl" --ranks 1 2 --reward rm --disagree judge --out "$OUT/reward.pairs.jsonl"
python recipes/s3_pairs.py --scored "$OUT/both.jsonl" --ranks 1 2 --reward judge --disagree rm --out "$OUT/judge.pairs.jsonl"

python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" --out "$OUT/alpaca.jsonl"
for name in reward judge; do
  for seed in 0 1 2; do
    model=$OUT/${name}_seed$seed
    torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --preset s3 --seed "$seed" --model "$MODEL" --pairs "$OUT/$name.pairs.jsonl" \
      --out "$model"
    python recipes/sample_beams.py --beams 3 --seed "$seed" --model "$model" --prompts "$OUT/alpaca.jsonl" --out "$model.answers.jsonl"
    python scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt" --baseline gpt4_1106_preview \
      --responses "$OUT/alpaca.jsonl" "$model.answers.jsonl" --out "$model.judged.jsonl"
    python evaluate.py winrate --scored "$model.judged.jsonl" --model "$model" --baseline gpt4_1106_preview --lc-data "$ALPACA" \
      --out "$model.winrate.json"
    python evaluate.py benchmarks --model "$model" --suite what-matters --out "$model.benchmarks.json"
  done
done
python report/table.py "$OUT"/*.winrate.json "$OUT"/*.benchmarks.json "$OUT"/*.pairs.meta.json "$OUT"/*/metrics.* --out "$OUT"
