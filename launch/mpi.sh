#!/usr/bin/env bash
# Train through MPI: launch/mpi.sh NPROC CONFIG [key=value ...]
# MPIEXEC says how, for instance "mpiexec -f hosts -ppn 8" (MPICH) or "mpirun --hostfile hosts --map-by ppr:8:node".
set -euo pipefail
if [ "$#" -lt 2 ]; then
    echo "usage: launch/mpi.sh NPROC CONFIG [key=value ...]" >&2
    exit 2
fi
nproc=$1
shift
export PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# -m mpi4py: a rank that fails aborts the others, who would wait for it in MPI_Finalize for ever
# shellcheck disable=SC2086
exec ${MPIEXEC:-mpiexec} -n "$nproc" "${PYTHON:-python3}" -m mpi4py -m megads train "$@"
