#!/usr/bin/env bash
# S1 Table 3 and Figs. 10 and 11: four answers per prompt made more diverse by asking for it (Appendix H) or by a temperature of 1, 2 or 3.
# SimpleMix's row is dpo_0.5 of s1_table2.sh. Not as in the paper: it does not say over what its "Avg. reward" goes (the table has the chosen
# and the rejected ones, "stats" of the meta files all samples), and answers that were cut stay in (--truncated keep, without an end-of-turn
# token): at 2 and 3 hardly any ends by itself. vLLM stops at temperature 2, so 3 runs in transformers, which is slow. One node of 8 x 80 GB;
# not run here.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
REWARD=${REWARD:-Skywork/Skywork-Reward-Gemma-2-27B-v0.2}
JUDGE=${JUDGE:-gpt-4-1106-preview}  # the key from OPENAI_API_KEY
ALPACA=${ALPACA:-alpaca_eval}  # alpaca_eval_gpt4_baseline.json, df_gamed.csv (hub: tatsu-lab/alpaca_eval), alpaca_eval_clf.txt (package)
OUT=${OUT:-out/s1_table3}
GPUS=${GPUS:-8}

python data/import_responses.py --format ultrafeedback_binarized --data HuggingFaceH4/ultrafeedback_binarized --out "$OUT/off.jsonl"
python generate.py --model "$MODEL" --prompts "$OUT/off.jsonl" --diverse --out "$OUT/prompting.jsonl"
for t in 0.7 1 2; do
  python generate.py --model "$MODEL" --prompts "$OUT/off.jsonl" --temperature "$t" --out "$OUT/tau_$t.jsonl"
done
python generate.py --model "$MODEL" --prompts "$OUT/off.jsonl" --temperature 3 --backend hf --out "$OUT/tau_3.jsonl"
python data/import_responses.py --format alpaca_eval --data "$ALPACA/alpaca_eval_gpt4_baseline.json" --out "$OUT/alpaca.jsonl"

for name in prompting tau_0.7 tau_1 tau_2 tau_3; do
  python score.py --model "$REWARD" --responses "$OUT/$name.jsonl" --out "$OUT/scored_$name.jsonl"
done
for name in prompting tau_1 tau_2 tau_3; do
  model=$OUT/dpo_$name
  python build_pairs.py --scored "$OUT/scored_$name.jsonl" --on-ratio 1 --truncated keep --out "$model.pairs.jsonl"
  torchrun --nproc-per-node "$GPUS" train_dpo.py --resume --activation-checkpointing --model "$MODEL" --pairs "$model.pairs.jsonl" --out "$model"
  python generate.py --greedy --model "$model" --prompts "$OUT/alpaca.jsonl" --out "$model.answers.jsonl"
  python scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt" --baseline gpt4_1106_preview \
    --responses "$OUT/alpaca.jsonl" "$model.answers.jsonl" --out "$model.judged.jsonl"
  python evaluate.py winrate --scored "$model.judged.jsonl" --model "$model" --baseline gpt4_1106_preview --lc-data "$ALPACA" \
    --out "$model.winrate.json"
  python evaluate.py benchmarks --model "$model" --suite simplemix --out "$model.benchmarks.json"
done
python report/figure.py rewards "$OUT"/scored_{prompting,tau_0.7,tau_2,tau_3}.jsonl --out "$OUT/fig10.png"
for name in prompting tau_0.7 tau_2 tau_3; do
  python report/figure.py rewards "$OUT/scored_$name.jsonl" --out "$OUT/fig11_$name.png"
done
python report/table.py "$OUT"/*.winrate.json "$OUT"/*.benchmarks.json "$OUT"/*.pairs.meta.json "$OUT"/*/metrics.* --out "$OUT"
