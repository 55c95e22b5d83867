#!/usr/bin/env bash
# Train through DeepSpeed's launcher: launch/deepspeed.sh HOSTFILE|NPROC CONFIG [key=value ...]
# DEEPSPEED_OPTIONS holds further options of `deepspeed`, such as "--no_ssh --node_rank 1 --master_addr gpu01".
set -euo pipefail
if [ "$#" -lt 2 ]; then
    echo "usage: launch/deepspeed.sh HOSTFILE|NPROC CONFIG [key=value ...]" >&2
    exit 2
fi
where=$1
shift
if [[ $where =~ ^[0-9]+$ ]]; then
    options=(--num_gpus "$where")
elif wrong=$(grep -nEv '^[[:space:]]*(#.*)?$|^[A-Za-z0-9_][A-Za-z0-9_.-]*[[:space:]]+slots=[0-9]+[[:space:]]*$' "$where"); then
    # deepspeed passes the names to ssh unread, where a leading "-" would be an option
    echo "$where: not 'HOST slots=N': $wrong" >&2
    exit 2
else
    options=(--hostfile "$where")
fi
export PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# shellcheck disable=SC2086
exec "${PYTHON:-python3}" -m deepspeed.launcher.runner "${options[@]}" ${DEEPSPEED_OPTIONS:-} --module megads train "$@"
