# Sourced by recipes of language models. Needs $python and $model; other flags come from the recipe.

train() {  # train FOLDER COMMAND SEED FLAG...: trains, unless it is finished, goes on if it began; it is $run afterwards
    local folder=$1 command=$2 seed=$3
    run=$(compgen -G "$folder/${model}__${command}__${seed}__*" | head -n 1) || true
    if [[ -z $run ]]; then
        "$python" -m "rl_lab.$command" --model "$model" --seed "$seed" --runs-dir "$folder" "${@:4}"
        run=$(compgen -G "$folder/${model}__${command}__${seed}__*" | head -n 1)
    elif [[ ! -f $run/evaluation.json ]]; then
        "$python" -m "rl_lab.$command" --resume "$run"
    fi
}
