#!/usr/bin/env bash
# Reproduce the preference results in the README: runs/preference.sh [grpo|dpo-task|dpo-pairs...]
#   grpo        GRPO of SmolLM2-135M on larger-of-two, five seeds
#   dpo-task    DPO on pairs of right and wrong answers of the same task, sampled from the model itself
#   dpo-pairs   DPO on human pairs, and a reward model of disjoint prompts that judges it against the model at the start
# Every run is a step of its own: skipped if it is finished, resumed if it was interrupted. In the environment, for other
# than the defaults:
#   SEEDS       "1 2 3 4 5"; dpo-pairs takes the first one only
#   PAIRS       human pairs, for dpo-pairs: the file harmless-base/test.jsonl.gz of Anthropic's hh-rlhf
#   DPO_STEPS, JUDGE_STEPS, ANSWERS    of dpo-pairs: gradient steps of 8 pairs (170, 85), and prompts to answer (500)
set -euo pipefail
cd "$(dirname "$0")/.."

(($#)) || set -- grpo dpo-task dpo-pairs
read -ra seeds <<< "${SEEDS:-1 2 3 4 5}"
pairs=${PAIRS:-}
model=smollm2-135m task=larger-of-two
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}

[[ " $* " != *" dpo-pairs "* || -f $pairs ]] || {  # before anything trains
    echo "PAIRS '$pairs': dpo-pairs takes the file harmless-base/test.jsonl.gz of hh-rlhf" >&2
    exit 2
}

"$python" -m rl_lab.models "$model"

adapter=(--lora-rank 16 --warmup 5 --batch-size 8 --max-tokens 256)

source runs/train_language.sh
keep() { "$python" -m rl_lab.curves.preference "$@"; }

for what; do
    runs=()
    case $what in
        grpo)
            for seed in "${seeds[@]}"; do
                train "runs/$what" grpo "$seed" --task "$task"
                runs+=("$run")
            done
            keep "grpo-$task" "${runs[@]}"
            ;;
        dpo-task)
            mkdir -p "runs/$what"
            [[ -f runs/$what/pairs.jsonl ]] ||
                "$python" -m rl_lab.verify "$model" --task "$task" --share 0 0.9 --num-prompts 600 \
                    --pairs "runs/$what/pairs.jsonl"
            [[ -f runs/$what/before.json ]] ||
                "$python" -m rl_lab.verify "$model" --task "$task" --json "runs/$what/before.json"
            for seed in "${seeds[@]}"; do
                train "runs/$what" dpo "$seed" --data "runs/$what/pairs.jsonl" --train 0 0.8 --holdout 0.8 0.9 \
                    --steps 80 --batch-size 8 --warmup 8 --learning-rate 1e-5 --micro-tokens 1024
                cp "runs/$what/before.json" "$run"
                [[ -f $run/after.json ]] ||
                    "$python" -m rl_lab.verify "$run" --task "$task" --json "$run/after.json"
                runs+=("$run")
            done
            keep "dpo-$task" "${runs[@]}"
            ;;
        dpo-pairs)  # the judge learns from 35 % of the prompts, the policy from 40 % others; the rest are to be answered
            train "runs/$what" reward_model "${seeds[0]}" --data "$pairs" --train 0.1 0.45 --holdout 0.45 1 \
                "${adapter[@]}" --learning-rate 2e-4 --steps "${JUDGE_STEPS:-85}"
            judge=$run
            keep reward-model-human-pairs "$judge"
            train "runs/$what" dpo "${seeds[0]}" --data "$pairs" --train 0.45 0.85 --holdout 0 0.32 \
                "${adapter[@]}" --learning-rate 3e-4 --steps "${DPO_STEPS:-170}" --micro-tokens 1024
            [[ -f $run/winrate.json ]] ||
                "$python" -m rl_lab.winrate --policy "$run" --baseline "$model" --judge "$judge" --prompts "$pairs" \
                    --share 0.85 0.1 --num-prompts "${ANSWERS:-500}" --max-new-tokens 64 --json "$run/winrate.json"
            keep dpo-human-pairs "$run"
            ;;
        *)
            echo "usage: runs/preference.sh [grpo|dpo-task|dpo-pairs...]" >&2
            exit 2
            ;;
    esac
done
