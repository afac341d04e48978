#!/usr/bin/env bash
# S1 Table 2: five sources of equally many pairs, two models, two data sets. By task Tables 4, 5; by category Figs. 2, 8.
#
#     SCALE=demo bash recipes/s1_table2.sh          (recipes/settings.sh tells what SCALE and the functions do)
#
# Not as in the paper: shares are exact and no prompt comes twice (its code interleaves with repetition), all pairs have
# labels of the reward model (in its code off-policy ones have GPT-4's), HyPO's formula is corrected and its lambda ours.
# DPO-Mix-P mixes the policy with the reference, which are the same model before any training. So it goes in two rounds:
# half of its pairs are plain samples; the mixtures, on other prompts, give the rest. (Its online form draws a plain pair
# with probability 0.3; here their share is a half.) 24 trainings on a node of 8 x 80 GB; not run there.
source "$(dirname "$0")/settings.sh"
read -ra models <<<"${MODELS:-meta-llama/Llama-3.1-8B-Instruct allenai/Llama-3.1-Tulu-3-8B-SFT}"
read -ra data_sets <<<"${DATA:-ultrafeedback helpsteer2}"
LABELER=${LABELER:-gpt-4o-mini} # names the category of each of AlpacaEval's prompts
OUT=${OUT:-out/s1_table2/$SCALE}
HYPO=(recipes/train_online.py --method hypo)
PAPER=(--paper recipes/paper/s1_table2.csv)
if [ "$SCALE" = demo ]; then models=("$MODEL") data_sets=(demo) PAPER=() HYPO+=(--max-new 48); fi
needs "${models[@]}" "$REWARD"

for MODEL in "${models[@]}"; do
  for data in "${data_sets[@]}"; do
    run=$OUT/${MODEL##*/}_$data # the settings are ${run}_off, ...
    case $data in
      ultrafeedback) off=("${OFF_POLICY[@]}") total=50000 ;;
      helpsteer2) off=(--format helpsteer2 --data nvidia/HelpSteer2) total=9000 ;;
      demo) off=("${OFF_POLICY[@]}") total=$N_PAIRS ;;
      *) stop "DATA must name ultrafeedback, helpsteer2 or both, found $data" ;;
    esac
    python data/import_responses.py "${off[@]}" --out "$run/off.jsonl"
    on_gpus "$run/on" generate.py --model "$MODEL" --prompts "$run/off.jsonl"
    on_gpus "$run/scored" score.py --model "$REWARD" --responses "$run"/on/*.jsonl "$run/off.jsonl"
    pairs=(build_pairs.py --scored "$run"/scored/*.jsonl)
    python "${pairs[@]}" --on-ratio 0 --total "$total" --out "${run}_off.pairs.jsonl"
    python "${pairs[@]}" --on-ratio 1 --total "$total" --out "${run}_on.pairs.jsonl"
    python "${pairs[@]}" --on-ratio 0.5 --total "$total" --out "${run}_simplemix.pairs.jsonl"
    for name in "${run}"_{off,on,simplemix}; do
      train train_dpo.py --model "$MODEL" --pairs "$name.pairs.jsonl" --out "$name"
    done
    train "${HYPO[@]}" --model "$MODEL" --pairs "${run}_off.pairs.jsonl" --out "${run}_hypo"

    first=${run}_mixp_round1
    python "${pairs[@]}" --on-ratio 1 --total $((total / 2)) --out "$first.pairs.jsonl"
    train train_dpo.py --model "$MODEL" --pairs "$first.pairs.jsonl" --out "$first"
    python data/decontaminate.py --prompts "$run/off.jsonl" --seen "$first.pairs.jsonl" --out "$run/other_prompts.jsonl"
    mixture=(recipes/sample_mixture.py --model "$first" --reference "$MODEL" --prompts "$run/other_prompts.jsonl")
    on_gpus "$run/mixture_1" "${mixture[@]}" --weights 1.5 -0.5
    on_gpus "$run/mixture_2" "${mixture[@]}" --weights 0.5 0.5
    on_gpus "$run/mixed" score.py --model "$REWARD" --responses "$run"/mixture_?/*.jsonl
    python build_pairs.py --scored "$run"/mixed/*.jsonl --on-ratio 1 --total $((total / 2)) --out "${run}_mixp.pairs.jsonl"
    train train_dpo.py --model "$first" --reference "$MODEL" --pairs "${run}_mixp.pairs.jsonl" --out "${run}_mixp"

    for name in "${run}"_{off,on,hypo,mixp,simplemix}; do win_rate "$name" "$name"; done
    for name in "${run}"_{off,on,hypo,mixp,simplemix}; do benchmarks "$name" "$name" simplemix; done
    python report/figure.py categories "${run}"_{off,on,simplemix}.winrate.json --out "${run}_categories.png"
  done
  win_rate "$MODEL" "$OUT/${MODEL##*/}"
  benchmarks "$MODEL" "$OUT/${MODEL##*/}" simplemix
done
python report/table.py "$OUT"/*.json "$OUT"/*/metrics.* "${PAPER[@]}" --out "$OUT"
