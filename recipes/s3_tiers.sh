#!/usr/bin/env bash
# S3 Tables 1, 2 and 5: chosen and rejected from five tiers of the same answers; SFT and online DPO on the best ones; three seeds each.
# Not as in the paper: its rule for the tiers is unpublished and not always ordered (here ranks, pairs of equal rewards left out), which
# Mistral models answered is our guess, and online DPO's sampling is not given (here temperature 1). 8 x 80 GB; not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-allenai/Llama-3.1-Tulu-3-8B-SFT}
REWARD=${REWARD:-Skywork/Skywork-Reward-Gemma-2-27B-v0.2}
DATA=${DATA:-ultrafeedback}  # and oasst2
SFT=${SFT:-tulu3_sft.jsonl}  # allenai/tulu-3-sft-mixture as JSONL: its prompts are left out
JUDGE=${JUDGE:-gpt-4-1106-preview}  # the key from OPENAI_API_KEY
ALPACA=${ALPACA:-alpaca_eval}  # alpaca_eval_gpt4_baseline.json, df_gamed.csv (hub: tatsu-lab/alpaca_eval), alpaca_eval_clf.txt (package)
OUT=${OUT:-out/s3_tiers/$DATA}
GPUS=${GPUS:-8}

case $DATA in  # with the two Mistrals a prompt needs answers from both versions of UltraFeedback to have five
  ultrafeedback)
    python data/import_responses.py --format ultrafeedback --data openbmb/UltraFeedback --out "$OUT/answers/original.jsonl"
    python data/import_responses.py --format ultrafeedback_binarized --data allenai/tulu-3-ultrafeedback-cleaned-on-policy-8b \
      --split train --out "$OUT/answers/prompts.jsonl" ;;
  oasst2) python data/import_responses.py --format oasst2 --data OpenAssistant/oasst2 --out "$OUT/answers/prompts.jsonl" ;;
esac
for mistral in mistralai/Mistral-7B-Instruct-v0.2 princeton-nlp/Mistral-7B-Instruct-SimPO; do
  python generate.py --preset s3 --n 1 --source off --model "$mistral" --prompts "$OUT/answers/prompts.jsonl" \
    --out "$OUT/answers/${mistral##*/}.jsonl"
done
python score.py --model "$REWARD" --responses "$OUT"/answers/*.jsonl --out "$OUT/all.jsonl"
python data/decontaminate.py --prompts "$OUT/all.jsonl" --seen "$SFT" --out "$OUT/scored.jsonl"
python recipes/s3_pairs.py --scored "$OUT/scored.jsonl" --tiers best/worst --out "$OUT/best_worst.pairs.jsonl"
python recipes/s3_pairs.py --scored "$OUT/scored.jsonl" --tiers best/low --out "$OUT/best_low.pairs.jsonl"
python recipes/s3_pairs.py --scored "$OUT/scored.jsonl" --tiers best/medium --out "$OUT/best_medium.pairs.jsonl"
python recipes/s3_pairs.py --scored "$OUT/scored.jsonl" --tiers best/high --out "$OUT/best_high.pairs.jsonl"
python recipes/s3_pairs.py --scored "$OUT/scored.jsonl" --tiers low/worst --out "$OUT/low_worst.pairs.jsonl"
python recipes/s3_pairs.py --scored "$OUT/scored.jsonl" --tiers medium/worst --out "$OUT/medium_worst.pairs.jsonl"
python recipes/s3_pairs.py --scored "$OUT/scored.jsonl" --tiers high/worst --out "$OUT/high_worst.pairs.jsonl"

python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" --out "$OUT/alpaca.jsonl"
for seed in 0 1 2; do
  for name in best_worst best_low best_medium best_high low_worst medium_worst high_worst; do
    torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --preset s3 --seed "$seed" --model "$MODEL" --pairs "$OUT/$name.pairs.jsonl" \
      --out "$OUT/${name}_seed$seed"
  done
  torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --preset s3 --seed "$seed" --loss sft --model "$MODEL" \
    --pairs "$OUT/best_worst.pairs.jsonl" --out "$OUT/sft_seed$seed"
  torchrun --nproc-per-node "$GPUS" recipes/train_online.py --resume --activation-checkpointing --method online-dpo \
    --max-new 1024 --preset s3 --seed "$seed" --model "$MODEL" --pairs "$OUT/best_worst.pairs.jsonl" --out "$OUT/online_seed$seed"
  for name in best_worst best_low best_medium best_high low_worst medium_worst high_worst sft online; do
    model=$OUT/${name}_seed$seed
    python recipes/sample_beams.py --beams 3 --seed "$seed" --model "$model" --prompts "$OUT/alpaca.jsonl" --out "$model.answers.jsonl"
    python scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt" --baseline gpt4_1106_preview \
      --responses "$OUT/alpaca.jsonl" "$model.answers.jsonl" --out "$model.judged.jsonl"
    python evaluate.py winrate --scored "$model.judged.jsonl" --model "$model" --baseline gpt4_1106_preview --lc-data "$ALPACA" \
      --out "$model.winrate.json"
    python evaluate.py benchmarks --model "$model" --suite what-matters --out "$model.benchmarks.json"
  done
done
python report/table.py "$OUT"/*.winrate.json "$OUT"/*.benchmarks.json "$OUT"/*.pairs.meta.json "$OUT"/*/metrics.* --out "$OUT"
