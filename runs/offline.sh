#!/usr/bin/env bash
# Reproduce the offline results in the README: runs/offline.sh [TASK-SET...], such as hopper-medium-replay.
# The data sets are the lab's own, made by runs/make_offline_data.sh. Every algorithm on every set is a step of its own:
# skipped if its results are kept, resumed if it was interrupted. ALGORITHMS="bc awac" changes what learns, STEPS and SEEDS
# the budget: such runs have folders of their own and are not kept, so that the table is of one budget.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

sets=()
for task in hopper walker2d halfcheetah; do
    for set in medium-replay medium medium-expert; do sets+=("$task-$set"); done
done
(($# == 0)) || sets=("$@")
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}

failed=() budget=${STEPS:-}${SEEDS:-}
finished() { local folder; for folder; do [[ -f $folder/model.safetensors ]] || return; done; }
same_data() {  # same_data TASK/SET: whether what is kept is of the data that lie here, as far as they can be read
    local kept note sum
    mapfile -t kept < <(compgen -G "runs/results/offline/lab-${1/\//-}-v0/*.json" || true)
    ((${#kept[@]})) || return 0
    sum=$("$python" -c "from rl_lab.offline import load; print(load('lab/$1-v0').checksum)" 2> /dev/null) || return 0
    for note in "${kept[@]}"; do grep -q "$sum" "$note" || return 1; done
}

for name in "${sets[@]}"; do
    task=${name%%-*} set=${name#*-}
    algorithms=(bc iql td3_bc)
    [[ $name == hopper-medium-replay || $name == walker2d-medium-replay ]] && algorithms+=(cql)
    [[ -z ${ALGORITHMS:-} ]] || read -ra algorithms <<< "$ALGORITHMS"
    for algo in "${algorithms[@]}"; do
        echo "=== $algo on lab/$task/$set-v0"
        folder=runs/$algo/$name${STEPS:+-$STEPS-steps}${SEEDS:+-$SEEDS-seeds}
        if [[ -z $budget ]] && compgen -G "runs/results/offline/lab-$task-$set-v0/${algo}__*.csv.gz" > /dev/null; then
            echo "results are kept; to train again remove runs/results/offline/lab-$task-$set-v0/${algo}__* and $folder"
            continue
        fi
        if [[ -z $budget ]] && ! same_data "$task/$set"; then
            failed+=("$algo on $name: runs/results/offline/lab-$task-$set-v0 is of other data of this name, remove it first")
            continue
        fi
        steps=50000 seeds=5
        [[ $algo == cql ]] && steps=40000 seeds=3
        mapfile -t folders < <(compgen -G "$folder/*__${algo}__*" || true)
        training=(--dataset "lab/$task/$set-v0" --total-timesteps "${STEPS:-$steps}" --num-seeds "${SEEDS:-$seeds}"
            --eval-every 10000 --checkpoint-every 10000 --runs-dir "$folder")
        ((${#folders[@]} == 0)) || training=(--resume "${folders[0]}")
        # One that diverges does so again when resumed; the others go on.
        if ((${#folders[@]} > 0)) && finished "${folders[@]}" || "$python" -m "rl_lab.$algo" "${training[@]}"; then
            mapfile -t folders < <(compgen -G "$folder/*__${algo}__*")
            [[ -n $budget ]] || "$python" -m rl_lab.curves.offline "${folders[@]}" || failed+=("keeping $algo on $name")
        else
            status=$?
            ((status != 130 && status != 143)) || exit "$status"  # somebody stopped it
            failed+=("$algo on $name")
        fi
    done
done
((${#failed[@]} == 0)) || { printf 'failed: %s\n' "${failed[@]}" >&2; exit 1; }
