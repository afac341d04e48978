#!/usr/bin/env bash
# S3 Table 4: 0, 10 and 20 % of UltraFeedback's off-policy pairs take in the best of eight answers of the model itself; two bases.
# Not as in the paper: its Algorithm 1 makes that answer the chosen one where it is better, its section 5.3 always the rejected one: both
# (the second keeps pairs whose rejected answer is the better one: most of those of the lower base). Its 0 % row of the base -4.18 repeats
# Low/Worst; by its mean that base is Medium/Worst. Which Mistral models answered is our guess. Three seeds; 8 x 80 GB; not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-allenai/Llama-3.1-Tulu-3-8B-SFT}
REWARD=${REWARD:-Skywork/Skywork-Reward-Gemma-2-27B-v0.2}
SFT=${SFT:-tulu3_sft.jsonl}  # allenai/tulu-3-sft-mixture as JSONL: its prompts are left out
JUDGE=${JUDGE:-gpt-4-1106-preview}  # the key from OPENAI_API_KEY
ALPACA=${ALPACA:-alpaca_eval}  # alpaca_eval_gpt4_baseline.json, df_gamed.csv (hub: tatsu-lab/alpaca_eval), alpaca_eval_clf.txt (package)
OUT=${OUT:-out/s3_onpolicy}
GPUS=${GPUS:-8}

python data/import_responses.py --format ultrafeedback --data openbmb/UltraFeedback --out "$OUT/off/original.jsonl"
python data/import_responses.py --format ultrafeedback_binarized --data allenai/tulu-3-ultrafeedback-cleaned-on-policy-8b \
  --split train --out "$OUT/off/prompts.jsonl"
for mistral in mistralai/Mistral-7B-Instruct-v0.2 princeton-nlp/Mistral-7B-Instruct-SimPO; do
  python generate.py --preset s3 --n 1 --source off --model "$mistral" --prompts "$OUT/off/prompts.jsonl" \
    --out "$OUT/off/${mistral##*/}.jsonl"
done
python generate.py --preset s3 --model "$MODEL" --prompts "$OUT/off/prompts.jsonl" --out "$OUT/samples.jsonl"
python score.py --model "$REWARD" --responses "$OUT"/off/*.jsonl --out "$OUT/off_all.jsonl"
python score.py --model "$REWARD" --responses "$OUT/samples.jsonl" --out "$OUT/on.jsonl"
python data/decontaminate.py --prompts "$OUT/off_all.jsonl" --seen "$SFT" --out "$OUT/off.jsonl"
python recipes/s3_pairs.py --scored "$OUT/off.jsonl" --tiers best/low --out "$OUT/hq_0.pairs.jsonl"
python recipes/s3_pairs.py --scored "$OUT/off.jsonl" --tiers medium/worst --out "$OUT/lq_0.pairs.jsonl"
for rho in 0.1 0.2; do
  python recipes/s3_pairs.py --scored "$OUT/off.jsonl" "$OUT/on.jsonl" --tiers best/low --replace "$rho" \
    --out "$OUT/hq_$rho.pairs.jsonl"
  python recipes/s3_pairs.py --scored "$OUT/off.jsonl" "$OUT/on.jsonl" --tiers medium/worst --replace "$rho" \
    --out "$OUT/lq_$rho.pairs.jsonl"
  python recipes/s3_pairs.py --scored "$OUT/off.jsonl" "$OUT/on.jsonl" --tiers best/low --replace "$rho" \
    --replace-rule rejected --inverted keep --out "$OUT/hq_${rho}_rejected.pairs.jsonl"
  python recipes/s3_pairs.py --scored "$OUT/off.jsonl" "$OUT/on.jsonl" --tiers medium/worst --replace "$rho" \
    --replace-rule rejected --inverted keep --out "$OUT/lq_${rho}_rejected.pairs.jsonl"
done

python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" --out "$OUT/alpaca.jsonl"
for name in hq_0 hq_0.1 hq_0.2 hq_0.1_rejected hq_0.2_rejected lq_0 lq_0.1 lq_0.2 lq_0.1_rejected lq_0.2_rejected; do
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
