#!/usr/bin/env bash
# Make the data sets of D4RL's locomotion tasks anew, after its protocol: runs/make_offline_data.sh [TASK...]
# TASK is halfcheetah, hopper or walker2d; all by default. Every data set is a step of its own, skipped if it is there;
# training that was interrupted goes on. In the environment, for other than the defaults:
#   STEPS   of the random, medium and expert sets: 200000; D4RL's have 1000000
#   SETS    which: "random medium expert medium-expert medium-replay"
#   AGENTS  for the expert sets: a clone of DLR-RM/rl-trained-agents, seen from this one
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

(($#)) || set -- halfcheetah hopper walker2d
steps=${STEPS:-200000}
sets=${SETS:-random medium expert medium-expert medium-replay}
agents=${AGENTS:-agents}
home=$(realpath -m "${MINARI_DATASETS_PATH:-$HOME/.minari/datasets}")
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}

there() { [[ -d $home/lab/$task/$1-v0 ]]; }
collect() { "$python" -m rl_lab.collect --dataset "lab/$task/$1-v0" "${@:2}"; }

run_folder() { compgen -G "runs/offline/${env}__sac__*" | head -n 1; }

train() {  # the run that ends at the medium level; its folder is $run
    run=$(run_folder) || true
    if [[ -z $run ]]; then
        "$python" -m rl_lab.sac --env "$env" --eval-every 5000 --until-return "$level" --checkpoint-every 20000 \
            --runs-dir runs/offline
        run=$(run_folder)
    elif [[ ! -f $run/model.safetensors ]]; then
        "$python" -m rl_lab.sac --resume "$run"
    fi
    "$python" - "$run" << 'END'
import sys
from pathlib import Path

from rl_lab import checkpoint

run = Path(sys.argv[1])
if not checkpoint.load(run)["run"]["reached"]:
    sys.exit(f"{run} ended below the medium level: remove it, and train another seed or for longer")
END
}

keep_actor() {  # of a finished run what acts, small enough for git
    "$python" - "$run" "$actor" << 'END'
import shutil
import sys
from pathlib import Path

from rl_lab import checkpoint

run, actor = map(Path, sys.argv[1:])
tensors, metadata = checkpoint.load_tensors(run / "model.safetensors")
actor.mkdir(exist_ok=True)
shutil.copy(run / "config.json", actor)
acting = {name: x for name, x in tensors.items() if name.startswith("params/actor/")}
checkpoint.save_tensors(actor / "model.safetensors", acting, metadata)
END
}

combine() {  # combine SET SET NEW: in a hidden folder that Minari does not list, so that NEW is whole or not there
    local scratch=$home/.combining-$task  # of its own: another task may be at it beside this one
    rm -rf "$scratch"
    mkdir -p "$scratch/lab/$task"
    ln -s "$home/lab/$task/$1-v0" "$home/lab/$task/$2-v0" "$scratch/lab/$task"
    MINARI_DATASETS_PATH=$scratch "$python" -m minari.cli combine "lab/$task/$1-v0" "lab/$task/$2-v0" \
        --dataset-id "lab/$task/$3-v0"
    mv "$scratch/lab/$task/$3-v0" "$home/lab/$task"
    rm -r "$scratch"
}

made=()
for task; do
    case $task in  # a third of what the expert returns, as D4RL's medium level
        halfcheetah) name=HalfCheetah level=4000 ;;
        hopper) name=Hopper level=1200 ;;
        walker2d) name=Walker2d level=1500 ;;
        *)
            echo "usage: runs/make_offline_data.sh [halfcheetah|hopper|walker2d...]" >&2
            exit 2
            ;;
    esac
    env=$name-v4 actor=runs/offline/$task-medium agent=$agents/tqc/$name-v3_1/$name-v3.zip
    for set in $sets; do
        echo "=== $task/$set"
        if there "$set"; then
            echo "is there; remove $home/lab/$task/$set-v0 to make it again"
        else
            case $set in
                random) collect random --env "$env" --random --steps "$steps" ;;
                medium)
                    if [[ ! -f $actor/model.safetensors ]]; then
                        train
                        keep_actor
                    fi
                    collect medium --run "$actor" --steps "$steps"
                    ;;
                expert)
                    if [[ -f $agent ]]; then
                        collect expert --env "$env" --sb3 "$agent" --steps "$steps"
                    else
                        echo "skipped: there is no $agent; AGENTS=FOLDER names a clone of DLR-RM/rl-trained-agents"
                    fi
                    ;;
                medium-expert)
                    if there medium && there expert; then
                        combine medium expert medium-expert
                    else
                        echo "skipped: it takes the medium and the expert set"
                    fi
                    ;;
                medium-replay)
                    train
                    collect medium-replay --replay "$run"
                    ;;
                *)
                    echo "SETS: there is no $set" >&2
                    exit 2
                    ;;
            esac
        fi
        ! there "$set" || made+=("lab/$task/$set-v0")
    done
done

echo "=== returns of all episodes, those included that were cut; scores are D4RL's"
"$python" - "${made[@]}" << 'END'
import sys

from rl_lab.offline import load

print("| data set | steps | episodes | return, mean ± std | score |\n|---|---:|---:|---:|---:|")
for name in sys.argv[1:]:
    data = load(name)
    returns = data.episode_returns
    mean, std = float(returns.mean()), float(returns.std(correction=0))
    print(f"| `{name}` | {len(data):,} | {len(returns):,} | {mean:,.1f} ± {std:,.1f} | {data.normalized(mean):.1f} |")
END
