#!/usr/bin/env bash
# S1 Fig. 5: off-policy pairs alone, filtered by quality, on-policiness, contrast or similarity, five shares kept of each.
# Not as in the paper: its embedding model, pooling and the normalisation of log-probabilities are not given. Here the model that is trained
# embeds (mean of its last states over the answer), and log-probabilities are sums, which favours short pairs (their lengths are printed).
# Quality is the reward model's, as the text says; its code takes GPT-4's. One node of 8 x 80 GB; not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
REWARD=${REWARD:-Skywork/Skywork-Reward-Gemma-2-27B-v0.2}
JUDGE=${JUDGE:-gpt-4-1106-preview}  # the key from OPENAI_API_KEY
ALPACA=${ALPACA:-alpaca_eval}  # alpaca_eval_gpt4_baseline.json, df_gamed.csv (hub: tatsu-lab/alpaca_eval), alpaca_eval_clf.txt (package)
OUT=${OUT:-out/s1_fig5}
GPUS=${GPUS:-8}

python data/import_responses.py --format ultrafeedback_binarized --data HuggingFaceH4/ultrafeedback_binarized --out "$OUT/off.jsonl"
python score.py --model "$REWARD" --responses "$OUT/off.jsonl" --out "$OUT/rewards.jsonl"
python score.py --scorer logp --model "$MODEL" --responses "$OUT/rewards.jsonl" --out "$OUT/logps.jsonl"
python scorers/embed.py --model "$MODEL" --responses "$OUT/logps.jsonl" --out "$OUT/scored.jsonl"
python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" --out "$OUT/alpaca.jsonl"

for p in 0.1 0.2 0.3 0.4 0.5; do
  python build_pairs.py --scored "$OUT/scored.jsonl" --on-ratio 0 --filter quality:$p --out "$OUT/dpo_quality_$p.pairs.jsonl"
  python build_pairs.py --scored "$OUT/scored.jsonl" --on-ratio 0 --filter onpolicy:$p --out "$OUT/dpo_onpolicy_$p.pairs.jsonl"
  python build_pairs.py --scored "$OUT/scored.jsonl" --on-ratio 0 --filter contrast:$p --out "$OUT/dpo_contrast_$p.pairs.jsonl"
  python build_pairs.py --scored "$OUT/scored.jsonl" --on-ratio 0 --filter similarity:$p --out "$OUT/dpo_similarity_$p.pairs.jsonl"
  for filter in quality onpolicy contrast similarity; do
    model=$OUT/dpo_${filter}_$p
    torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --model "$MODEL" --pairs "$model.pairs.jsonl" --out "$model"
    python generate.py --greedy --model "$model" --prompts "$OUT/alpaca.jsonl" --out "$model.answers.jsonl"
    python scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt" --baseline gpt4_1106_preview \
      --responses "$OUT/alpaca.jsonl" "$model.answers.jsonl" --out "$model.judged.jsonl"
    python evaluate.py winrate --scored "$model.judged.jsonl" --model "$model" --baseline gpt4_1106_preview --lc-data "$ALPACA" \
      --out "$model.winrate.json"
  done
done
python report/figure.py filters "$OUT"/*.winrate.json "$OUT"/*.pairs.meta.json --out "$OUT/fig5.png"
python report/table.py "$OUT"/*.winrate.json "$OUT"/*.pairs.meta.json "$OUT"/*/metrics.* --out "$OUT"
