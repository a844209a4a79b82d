# shellcheck shell=bash disable=SC2154
# Sourced by every recipe, which sets three arrays and calls `launch NAME SIZE "$@"`:
#
#   model      flags of the network, the same at every size
#   training   flags of the full run
#   tiny       what the tiny form overrides of them; a later flag wins over an earlier one
#
# SIZE.json lies beside the recipe, its tiny form in tiny/. What a recipe understands by itself:
#
#   --tiny          three steps on random tokens, one CPU process, fp32
#   --print-flags   the flags of open_lm.main, and nothing is run
#
# All else is passed on, after the recipe's own flags. From the environment:
#
#   DATA       manifests to train on, with blanks between them; DATA_KEY: their tars' members, default json.gz
#   LOGS       folder of the runs, default logs
#   NPROC      processes on this host, default 8; TORCHRUN: more for torchrun, e.g. "--nnodes 4 --rdzv-…"
#   PYTHON     default python

TINY_RUN=(--dataset-type synthetic --precision fp32 --global-batch-size 2 --accum-freq 1 --train-num-samples 1024
    --epochs 1 --max-steps 3 --warmup 1 --log-every-n-steps 1 --workers 0)

# launch NAME SIZE ARGUMENT...
launch() {
    local name=$1 size=$2 form=full print=no here word
    shift 2
    here=$(dirname "${BASH_SOURCE[0]}")
    local -a extra=() flags=() manifests=() torchrun=()
    for word in "$@"; do
        case $word in
        --tiny) form=tiny ;;
        --print-flags) print=yes ;;
        *) extra+=("$word") ;;
        esac
    done

    if [[ $form == tiny ]]; then
        flags=(--model "$here/tiny/$size.json" "${model[@]}" "${training[@]}" "${TINY_RUN[@]}" "${tiny[@]}"
            --logs "${LOGS:-logs}" --name "$name-tiny-$(date +%Y%m%d-%H%M%S)")
    else
        if [[ $print == no && -z ${DATA:-} ]]; then
            echo "$name: set DATA to the manifests to train on, or use --tiny" >&2
            exit 2
        fi
        read -r -a manifests <<<"${DATA:-manifest.jsonl}"
        [[ $size == open_lm_* ]] || size=$here/$size.json # open_lm's own models are known by name
        flags=(--model "$size" "${model[@]}" "${training[@]}" --dataset-manifest "${manifests[@]}"
            --data-key "${DATA_KEY:-json.gz}" --precision amp_bfloat16 --fsdp --fsdp-amp
            --logs "${LOGS:-logs}" --name "$name" --resume latest)
    fi
    flags+=(${extra[@]+"${extra[@]}"})

    if [[ $print == yes ]]; then
        printf '%q ' "${flags[@]}"
        echo
    elif [[ $form == tiny ]]; then
        exec "${PYTHON:-python}" -m open_lm.main "${flags[@]}"
    else
        read -r -a torchrun <<<"${TORCHRUN:-}"
        # `--`: some Pythons' torchrun takes the program's --logs for its own --logs-specs
        exec "${PYTHON:-python}" -m torch.distributed.run --nproc-per-node "${NPROC:-8}" \
            ${torchrun[@]+"${torchrun[@]}"} -m -- open_lm.main "${flags[@]}"
    fi
}
