#!/usr/bin/env bash
# S1 Table 2 for one model and one data set: five sources of equally many pairs; by task Tables 4 and 5, by category Figs. 2 and 8.
# Not as in the paper: shares are exact and no prompt comes twice (its code interleaves with repetition), off-policy pairs too are labelled
# by the reward model (its code takes GPT-4's labels), HyPO's formula is corrected and its lambda ours, DPO-Mix-P goes in two rounds: plain
# samples for one half of the prompts, then mixtures of both models for the other. One node of 8 x 80 GB; not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}  # and allenai/Llama-3.1-Tulu-3-8B-SFT
DATA=${DATA:-ultrafeedback}                       # and helpsteer2, with TOTAL=9000
TOTAL=${TOTAL:-50000}
REWARD=${REWARD:-Skywork/Skywork-Reward-Gemma-2-27B-v0.2}
JUDGE=${JUDGE:-gpt-4-1106-preview}  # the key from OPENAI_API_KEY
ALPACA=${ALPACA:-alpaca_eval}  # alpaca_eval_gpt4_baseline.json, df_gamed.csv (hub: tatsu-lab/alpaca_eval), alpaca_eval_clf.txt (package)
OUT=${OUT:-out/s1_table2/$DATA/${MODEL##*/}}
GPUS=${GPUS:-8}
half=$((TOTAL / 2))

case $DATA in
  ultrafeedback) python data/import_responses.py --format ultrafeedback_binarized \
    --data HuggingFaceH4/ultrafeedback_binarized --out "$OUT/off.jsonl" ;;
  helpsteer2) python data/import_responses.py --format helpsteer2 --data nvidia/HelpSteer2 --out "$OUT/off.jsonl" ;;
esac
python generate.py --model "$MODEL" --prompts "$OUT/off.jsonl" --out "$OUT/on.jsonl"
for k in 0 1; do  # two halves of the prompts, for DPO-Mix-P's rounds
  python score.py --model "$REWARD" --responses "$OUT/on.jsonl" "$OUT/off.jsonl" --shard "$k/2" --out "$OUT/scored_$k.jsonl"
done
for share in 0 0.5 1; do  # off-policy DPO, SimpleMix, on-policy DPO
  python build_pairs.py --scored "$OUT/scored_0.jsonl" "$OUT/scored_1.jsonl" --on-ratio "$share" --total "$TOTAL" \
    --out "$OUT/dpo_$share.pairs.jsonl"
  torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --model "$MODEL" --pairs "$OUT/dpo_$share.pairs.jsonl" \
    --out "$OUT/dpo_$share"
done
torchrun --nproc-per-node "$GPUS" recipes/train_online.py --resume --activation-checkpointing --method hypo --model "$MODEL" --pairs "$OUT/dpo_0.pairs.jsonl" --out "$OUT/hypo"

python build_pairs.py --scored "$OUT/scored_0.jsonl" --on-ratio 1 --total "$half" --out "$OUT/mixp_1.pairs.jsonl"
torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --model "$MODEL" --pairs "$OUT/mixp_1.pairs.jsonl" --out "$OUT/mixp_1"
python recipes/sample_mixture.py --model "$OUT/mixp_1" --reference "$MODEL" --weights 1.5 -0.5 --prompts "$OUT/scored_1.jsonl" --out "$OUT/mixp_a.jsonl"
python recipes/sample_mixture.py --model "$OUT/mixp_1" --reference "$MODEL" --weights 0.5 0.5 --prompts "$OUT/scored_1.jsonl" --out "$OUT/mixp_b.jsonl"
python score.py --model "$REWARD" --responses "$OUT/mixp_a.jsonl" "$OUT/mixp_b.jsonl" --out "$OUT/mixp_scored.jsonl"
python build_pairs.py --scored "$OUT/mixp_scored.jsonl" --on-ratio 1 --total "$half" --out "$OUT/mixp_2.pairs.jsonl"
torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --model "$OUT/mixp_1" --reference "$MODEL" --pairs "$OUT/mixp_2.pairs.jsonl" \
  --out "$OUT/mixp_2"

python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" --out "$OUT/gpt4.jsonl"
python scorers/category.py --model gpt-4o-mini --responses "$OUT/gpt4.jsonl" --out "$OUT/alpaca.jsonl"
for model in "$MODEL" "$OUT/dpo_0" "$OUT/dpo_0.5" "$OUT/dpo_1" "$OUT/hypo" "$OUT/mixp_2"; do
  name=$OUT/eval/${model##*/}
  python generate.py --greedy --model "$model" --prompts "$OUT/alpaca.jsonl" --out "$name.answers.jsonl"
  python scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt" --baseline gpt4_1106_preview \
    --responses "$OUT/alpaca.jsonl" "$name.answers.jsonl" --out "$name.judged.jsonl"
  python evaluate.py winrate --scored "$name.judged.jsonl" --model "$model" --baseline gpt4_1106_preview --lc-data "$ALPACA" \
    --out "$name.winrate.json"
  python evaluate.py benchmarks --model "$model" --suite simplemix --out "$name.benchmarks.json"
done
python report/figure.py categories "$OUT"/eval/*.winrate.json --out "$OUT/fig8.png"
python report/table.py "$OUT"/eval/*.winrate.json "$OUT"/eval/*.benchmarks.json "$OUT"/*.pairs.meta.json "$OUT"/*/metrics.* \
  --start "${MODEL##*/}" --out "$OUT"
