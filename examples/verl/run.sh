#!/usr/bin/env bash
# OBLR-PO in verl. From the root of the repository, with verl, vLLM and snr-optim[verl,examples] installed:
#
#   examples/verl/run.sh TRAIN.jsonl TEST.jsonl [more settings of verl]
#   DRY_RUN=1 examples/verl/run.sh TRAIN.jsonl TEST.jsonl     # prepares the data, checks the config, starts nothing
set -euo pipefail
if [[ $# -lt 2 ]]; then
    sed -n '2,5s/^# \?//p' "$0" >&2
    exit 2
fi
here=$(dirname "$0") train=$1 test=$2
shift 2
data=${DATA:-data}
for split in train test; do
    PYTHONPATH=$here/../..${PYTHONPATH:+:$PYTHONPATH} python -m examples.verl.prepare "${!split}" "$data/$split.parquet"
done
settings=(data.train_files="$data/train.parquet" data.val_files="$data/test.parquet"
    reward.custom_reward_function.path="$here/reward.py" "$@")
python -m snr_optim.integrations.verl check --config-dir "$here" --config-name oblr_po "${settings[@]}"
if [[ -z ${DRY_RUN:-} ]]; then
    python -m verl.trainer.main_ppo --config-dir "$here" --config-name oblr_po "${settings[@]}"
fi
