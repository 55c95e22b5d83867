#!/usr/bin/env bash
# Train on this host: launch/local.sh NPROC CONFIG [key=value ...]
set -euo pipefail
if [ "$#" -lt 2 ]; then
    echo "usage: launch/local.sh NPROC CONFIG [key=value ...]" >&2
    exit 2
fi
nproc=$1
shift
export PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m megads launch --nproc "$nproc" -- train "$@"
