#!/usr/bin/env bash
# Everything about the triton backend that only a GPU can tell, on 16 cores:
#   bash moe/gpu.sh OUTPUT [parity] [warm] [tune] [layers] [memory] [curves] [steps]
# Without steps: parity, tune, warm, layers and memory, in this order; without the others about four minutes. Each has a limit of seconds and a log OUTPUT/<step>.txt; records are OUTPUT/*.jsonl.
# WRITE=1 puts the fastest tiles into the table before the layers are timed. `curves` needs DATA, a manifest of text.
# STEPS_OF='"160m 1 32,160m 8 32"' times these runs alone.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHON=${PYTHON:-python}
output=${1:?where to write}
shift
mkdir -p "$output"
# what `warm` compiles, `layers` finds again
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/moe_inductor} TORCHINDUCTOR_COMPILE_THREADS=2
shapes=(${SHAPES:-160m 410m 830m olmoe qwen3_moe})
plans=(${PLANS:-recompute recompute+in_place save+in_place})
backends=(triton)
$PYTHON -c "import megablocks" 2> /dev/null && backends+=(megablocks)
layers=(--compile --graph --routing random zipf)

# step SECONDS NAME COMMAND...
step() {
    local limit=$1 name=$2 began=$SECONDS
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | grep -v Warning | tee "$output/$name.txt" | tail -n "${LINES_SHOWN:-60}"
    echo "== $name: exit ${PIPESTATUS[0]}, $((SECONDS - began)) s, $SECONDS s in all"
}

parity() {
    # one process per shape: most of the time is compiling
    local pids=()
    for shape in "${shapes[@]}"; do
        $PYTHON moe/parity.py "$shape" --plans "${plans[@]}" &
        pids+=($!)
    done
    $PYTHON moe/parity.py 160m --plans recompute save+in_place --compile &
    pids+=($!)
    local failed=0
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    return $failed
}

# Fills the compilers' caches, all shapes side by side: these timings are worth nothing.
warm() {
    for shape in "${shapes[@]}"; do
        $PYTHON moe/bench.py "$shape" --backends triton --plans "${plans[@]}" --compile --routing random zipf \
            --repeats 1 > /dev/null &
    done
    wait
}

tune() {
    local options=(--kernels up up_backward dw2 --processes 14 --best 3 --output "$output/tiles.jsonl")
    [ -n "${WRITE:-}" ] && options+=(--write)
    $PYTHON moe/tune.py "${shapes[@]}" "${options[@]}"
}

layer_table() {
    $PYTHON moe/bench.py "${shapes[@]}" --backends "${backends[@]}" --plans "${plans[@]}" "${layers[@]}" \
        --output "$output/layer.jsonl"
}

memory() {
    $PYTHON moe/bench.py 160m --backends triton --plans recompute save+in_place --compile --repeats 3 --blocks 16
}
# 300 steps on text beside another backend.
curves() {
    for one in "41m 16" "160m 8"; do
        set -- $one
        $PYTHON moe/curves.py --data "$DATA" --models "$1" --batch-size "$2" --backends reference grouped_mm triton \
            --at-once 2 --record "$output/curves.jsonl" &
    done
    wait
}

# MODEL EXPERTS BATCH of the step table, by groups whose runs share the GPU while they compile.
groups=("41m 1 32,87m 1 32,41m 8 32,87m 8 32" "160m 1 32,160m 8 32" "160m 32 32" "410m 1 16" "410m 8 16" "830m 1 16" "830m 8 8")
[ -n "${STEPS_OF:-}" ] && eval "groups=($STEPS_OF)"
timed_step() { # STEPS RECORD MODEL EXPERTS BATCH
    local flags=""
    [ "$4" -gt 1 ] && flags="--moe-capacity-factor 0"
    $PYTHON moe/bench.py steps --models "$3" --experts "$4" --batch-size "$5" --steps "$1" --flags="$flags" \
        --record "$2"
}
# Each group is compiled side by side first, then timed one by one.
steps() {
    local group model models
    for group in "${groups[@]}"; do
        IFS=, read -ra models <<< "$group"
        if [ ${#models[@]} -gt 1 ]; then
            for model in "${models[@]}"; do timed_step 3 /dev/null $model > /dev/null & done
            wait
        fi
        for model in "${models[@]}"; do timed_step 36 "$output/speed.jsonl" $model; done
    done
}
export -f parity warm tune layer_table memory curves timed_step steps
# arrays do not pass through the environment
export ARRAYS="$(declare -p shapes plans backends layers groups)" output
run() { step "$1" "$2" bash -c 'eval "$ARRAYS"; '"$3"; }

[ $# -eq 0 ] && set -- parity tune warm layers memory
for wanted in "$@"; do
    case $wanted in
        parity) run 60 parity parity ;;
        tune) run 100 tune tune ;;
        warm) run 60 warm warm ;;
        layers) run 150 layers layer_table ;;
        memory) run 40 memory memory ;;
        curves) run 200 curves curves ;;
        steps) run 560 steps steps ;;
        *) echo "no step $wanted" >&2; exit 2 ;;
    esac
done
