#!/usr/bin/env bash
# S3 Table 3: a large or small gap between chosen and rejected, and chosen ones of high or low reward, from UltraFeedback's four answers.
# Not as in the paper: its rule is unpublished. Here the ranks of the four answers, which come near its means: 1 over 3 and 2 over 4 with a
# gap of 1.5 or more, 1 over 2, 3 over 4, each set on all prompts that have such a pair (the paper: on the 41,633 that Tulu 3's version has
# too). LG-HQ-inv, the first over the second, is then SG-HQ on the prompts of LG-HQ. Pairs that a swap inverts are dropped; the paper kept some.
# Three seeds; 8 x 80 GB; not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-allenai/Llama-3.1-Tulu-3-8B-SFT}
REWARD=${REWARD:-Skywork/Skywork-Reward-Gemma-2-27B-v0.2}
SFT=${SFT:-tulu3_sft.jsonl}  # allenai/tulu-3-sft-mixture as JSONL: its prompts are left out
JUDGE=${JUDGE:-gpt-4-1106-preview}  # the key from OPENAI_API_KEY
ALPACA=${ALPACA:-alpaca_eval}  # alpaca_eval_gpt4_baseline.json, df_gamed.csv (hub: tatsu-lab/alpaca_eval), alpaca_eval_clf.txt (package)
OUT=${OUT:-out/s3_gaps}
GPUS=${GPUS:-8}

python data/import_responses.py --format ultrafeedback --data openbmb/UltraFeedback --out "$OUT/off.jsonl"
python data/decontaminate.py --prompts "$OUT/off.jsonl" --seen "$SFT" --out "$OUT/clean.jsonl"
python score.py --model "$REWARD" --responses "$OUT/clean.jsonl" --out "$OUT/scored.jsonl"
python recipes/s3_pairs.py --scored "$OUT/scored.jsonl" --ranks 1 3 --gap 1.5 inf --out "$OUT/lg_hq.pairs.jsonl"
python recipes/s3_pairs.py --scored "$OUT/scored.jsonl" --ranks 2 4 --gap 1.5 inf --out "$OUT/lg_lq.pairs.jsonl"
python recipes/s3_pairs.py --scored "$OUT/scored.jsonl" --ranks 1 2 --out "$OUT/sg_hq.pairs.jsonl"
python recipes/s3_pairs.py --scored "$OUT/scored.jsonl" --ranks 3 4 --out "$OUT/sg_lq.pairs.jsonl"
python recipes/s3_pairs.py --scored "$OUT/scored.jsonl" --ranks 1 3 --gap 1.5 inf --swap-rejected "$OUT/sg_hq.pairs.jsonl" \
  --out "$OUT/lg_hq_inv.pairs.jsonl"
python recipes/s3_pairs.py --scored "$OUT/scored.jsonl" --ranks 1 2 --swap-rejected "$OUT/sg_lq.pairs.jsonl" \
  --out "$OUT/sg_hq_inv.pairs.jsonl"

python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" --out "$OUT/alpaca.jsonl"
for name in lg_hq lg_lq sg_hq sg_lq lg_hq_inv sg_hq_inv; do
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
