#!/usr/bin/env bash
# S2 Table 2 and Fig. 3: Zephyr on pairs of another model, PC_llama, in the first iteration and after PC_off. C.5 and 5.4:
# the quality of PC_llama and of PC_on, by an answer of theirs against PC_off's chosen one on 805 random prompts.
#
#     SCALE=demo bash recipes/s2_pc_llama.sh          (recipes/settings.sh tells what SCALE and the functions do)
#
# The rows of PC_off and PC_on are Table 1's: what s2_stages.sh has made is taken, what is missing it makes. Not as in the
# paper: answers to AlpacaEval are greedy (it does not say how); 5.4 does not say whose samples PC_on are (here the start
# model's; in pc_on-on, which has the paper's number, those of the model after PC_on) and prints a share, 0.46. 6 trainings,
# 4 of them of s2_stages.sh, on a node of 8 x 80 GB; not run there. Demo: the other model is the policy after its own pairs.
source "$(dirname "$0")/settings.sh" || exit
setting MODEL alignment-handbook/zephyr-7b-sft-full out/models/policy; export MODEL # or out/s2_sft/Qwen2.5-1.5B, Qwen/Qwen3-4B
setting STAGES "out/s2_stages/${MODEL##*/}_dpo" # OUT of s2_stages.sh
setting LLAMA meta-llama/Meta-Llama-3-8B-Instruct "$STAGES/on"
setting PAIRS "$PAIRS" "--total $((N_PAIRS * 3 / 4))"
default OUT "out/s2_pc_llama/${MODEL##*/}"
start=${MODEL##*/} chat=()
if [[ $start = Qwen3-* ]]; then chat=(--template-kwargs '{"enable_thinking":false}'); fi
judge=(scorers/judge.py --model "$JUDGE" --judge-prompt "$ALPACA/alpaca_eval_clf.txt")
if [ "$SCALE" = demo ]; then judge=("$SCORE_SCRIPT" --model "$REWARD"); fi
needs "$MODEL" "$(model_of $PREFERENCE)" ${LLAMA#"$STAGES/on"} # which is made below

quality() { # NAME SAMPLES ...: the first of a prompt's samples against PC_off's chosen answer
  mkdir -p "$OUT/quality"
  python - "$STAGES/off.pairs.jsonl" "$@" >"$OUT/quality/$1.jsonl" <<'END'
import json, random, sys
pairs, name, *samples = sys.argv[1:]
chosen = {pair["id"]: pair["chosen"][0]["content"] for pair in map(json.loads, open(pairs))}
drawn = set(random.Random(0).sample(sorted(chosen), min(805, len(chosen))))  # the same for every NAME
for row in (json.loads(line) for path in samples for line in open(path)):
    if row["id"] in drawn:
        texts = {name: row["responses"][0]["text"], "pc_off": chosen[row["id"]]}
        row["responses"] = [{"text": text, "source": "off", "model": model} for model, text in texts.items()]
        print(json.dumps(row))
END
  python "${judge[@]}" --responses "$OUT/quality/$1.jsonl" --out "$OUT/quality/$1.judged.jsonl"
  python evaluate.py --scored "$OUT/quality/$1.judged.jsonl" --model "$1" --baseline pc_off \
    --out "$OUT/quality/$1.winrate.json"
}

if [ ! -e "$STAGES/off-on.winrate.json" ]; then # of Table 1: the first iteration, and the second after PC_off
  LOSS=dpo SEED=0 OUT=$STAGES STARTS="$MODEL $STAGES/off" bash recipes/s2_stages.sh
fi
on_gpus "$OUT/samples" generate.py --preset s2 --source off --seed 1 --model "$LLAMA" --prompts "$STAGES/off_policy.jsonl"
on_gpus "$OUT/scored" $PREFERENCE --responses "$OUT"/samples/*.jsonl
python "$PAIRS_SCRIPT" --scored "$OUT"/scored/*.jsonl --on-ratio 0 $PAIRS --out "$OUT/llama.pairs.jsonl"
SAMPLE="${chat[*]} $SAMPLE"
train "$TRAIN_SCRIPT" --preset s2 "${chat[@]}" --model "$MODEL" --pairs "$OUT/llama.pairs.jsonl" --out "$OUT/llama"
train "$TRAIN_SCRIPT" --preset s2 "${chat[@]}" --model "$STAGES/off" --pairs "$OUT/llama.pairs.jsonl" --out "$OUT/off-llama"
for run in llama off-llama; do win_rate "$OUT/$run" "$OUT/$run"; done

on_gpus "$STAGES/on.own" generate.py --preset s2 --model "$STAGES/on" --prompts "$STAGES/off_policy.jsonl"
quality pc_llama "$OUT"/samples/*.jsonl
quality pc_on "$STAGES/$start".own/*.jsonl
quality pc_on-on "$STAGES"/on.own/*.jsonl
python report/table.py "$OUT"/quality/*.json --paper recipes/paper/s2_quality.csv --out "$OUT/quality"
python report/figure.py training "$STAGES"/{off,on}/metrics.jsonl "$OUT/llama/metrics.jsonl" --out "$OUT/fig3.png"
python report/table.py "$STAGES"/{"$start",off,on,off-off,off-on}.*.json "$STAGES"/{off,on,off-off,off-on}/metrics.* \
  "$OUT"/*.json "$OUT"/*/metrics.* --start "$start" --delta "$start" off llama --delta off off-off off-llama \
  --paper recipes/paper/s2_pc_llama.csv --out "$OUT"
