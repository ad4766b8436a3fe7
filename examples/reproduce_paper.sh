#!/usr/bin/env bash
# LLaVA-1.5-7B under HiDrop's three budgets on eleven benchmarks, beside the averages of the paper (table 1 of its first version).
#
#   reproduce_paper.sh CHECKPOINTS TOWER OUTPUT [option of lmms-eval ...]
#   DRY_RUN=1 reproduce_paper.sh ...        # print the commands, run none
#
# CHECKPOINTS has four directories in LLaVA's format: llava-v1.5-7b, and hidrop-80, hidrop-64, hidrop-48 as their authors
# trained them (HarrisonWu/HiDrop on the Hub). TOWER is openai/clip-vit-large-patch14-336. OUTPUT gets the models and results.
#
# Ten benchmarks are those of the scripts in the authors' repository, and VizWiz is in their paper. lmms-eval scores them on other
# splits than the paper where that needs a server: VQAv2 and VizWiz on val, MMBench on dev. MM-Vet is judged by a GPT model, and
# so are answers to MMBench that are no letter: set OPENAI_API_KEY. BATCH_SIZE (8) and PROCESSES (1), one a GPU, are read too.
#
# Not run yet: its commands are tested, its numbers are not.
set -euo pipefail

if (($# < 3)); then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
checkpoints=$1 tower=$2 output=$3
shift 3
examples=$(dirname "$0")
tasks=gqa,vqav2_val,vizwiz_vqa_val,scienceqa_img,textvqa_val,pope,mme,mmbench_en_dev,mmbench_cn_dev,seedbench,mmvet

run() {
    printf '%q ' "$@"
    echo
    if [[ -z ${DRY_RUN:-} ]]; then "$@"; fi
}

import() { # name, schedule
    if [[ -e $output/models/$1 ]]; then return; fi
    run hidrop import-llava "$checkpoints/$1" --vision-tower "$tower" --output "$output/models/$1" --schedule "$2"
}

evaluate() { # name, schedule, option ...
    local name=$1 schedule=$2
    shift 2
    run accelerate launch --num_processes "${PROCESSES:-1}" -m lmms_eval --model hidrop \
        --model_args "pretrained=$output/models/$name,schedule=$schedule,batch_size=${BATCH_SIZE:-8}" \
        --tasks "$tasks" --output_path "$output/results/$name" --log_samples "$@"
}

import llava-v1.5-7b identity
evaluate llava-v1.5-7b vanilla "$@"
for budget in hidrop-80 hidrop-64 hidrop-48; do
    import "$budget" "$budget"
    evaluate "$budget" "$budget" "$@"
done
run python "$examples/reproduce_table.py" "$output/results"
