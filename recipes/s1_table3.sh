#!/usr/bin/env bash
# S1 Table 3, Figs. 10, 11: SimpleMix, and four answers per prompt made more diverse by asking for it (Appendix H) or by a
# temperature of 1, 2 or 3.
#
#     SCALE=demo bash recipes/s1_table3.sh          (recipes/settings.sh tells what SCALE and the functions do)
#
# Not as in the paper: it does not say over what its "Avg. Reward" goes (here all samples, of SimpleMix both sources'; the
# means over the pairs are in report.md's pair_sets). In all settings except SimpleMix, answers that were cut stay in,
# without an end-of-turn token: at 2 and 3 hardly any ends by itself. The figures have temperature 1 too. vLLM stops at 2,
# so 3 is sampled in transformers, which is slow. 5 trainings on a node of 8 x 80 GB; not run there.
source "$(dirname "$0")/settings.sh" || exit
setting MODEL meta-llama/Llama-3.1-8B-Instruct out/models/policy
default OUT "out/s1_table3/${MODEL##*/}"
needs "$MODEL" "$REWARD"

python data/import_responses.py $OFF_POLICY --out "$OUT/samples/off/0.jsonl"
prompts=(--model "$MODEL" --prompts "$OUT/samples/off/0.jsonl")
on_gpus "$OUT/samples/prompting" recipes/sample_diverse.py "${prompts[@]}"
for t in 0.7 1 2; do on_gpus "$OUT/samples/tau_$t" generate.py "${prompts[@]}" --temperature "$t"; done
on_gpus "$OUT/samples/tau_3" generate.py "${prompts[@]}" --temperature 3 --backend hf

for name in off prompting tau_0.7 tau_1 tau_2 tau_3; do
  on_gpus "$OUT/rewards/$name" "$SCORE_SCRIPT" --model "$REWARD" --responses "$OUT/samples/$name"/*.jsonl
  cat "$OUT/rewards/$name"/*.jsonl >"$OUT/rewards/$name.jsonl" # the figures name their curves by files
done

for name in prompting tau_1 tau_2 tau_3 simplemix; do
  run=$OUT/$name
  pairs=(--scored "$OUT/rewards/$name.jsonl" --on-ratio 1 --truncated keep)
  if [ "$name" = simplemix ]; then pairs=(--scored "$OUT"/rewards/{tau_0.7,off}.jsonl --on-ratio 0.5); fi
  python "$PAIRS_SCRIPT" "${pairs[@]}" $PAIRS --out "$run.pairs.jsonl"
  train "$TRAIN_SCRIPT" --model "$MODEL" --pairs "$run.pairs.jsonl" --out "$run"
  win_rate "$run" "$run"
  benchmarks "$run" "$run" simplemix
done

python report/figure.py rewards "$OUT"/rewards/{prompting,tau_0.7,tau_1,tau_2,tau_3}.jsonl --out "$OUT/fig10.png"
for name in prompting tau_0.7 tau_1 tau_2 tau_3; do
  python report/figure.py rewards "$OUT/rewards/$name.jsonl" --out "$OUT/fig11_$name.png"
done
python report/table.py "$OUT"/*.json "$OUT"/*/metrics.* --paper recipes/paper/s1_table3.csv --out "$OUT"
