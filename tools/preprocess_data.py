"""Text to a tokenized corpus in Megatron's format. The work is in megads/data/preprocess.py; here MPI is met.

python tools/preprocess_data.py ...
mpiexec -n 4 python -m mpi4py tools/preprocess_data.py --mpi ...      a rank that dies takes the others with it
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy starts a pool of threads that nothing here needs
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from megads.data.preprocess import main
from megads.errors import DataError


class MpiTeam:
    """The ranks of MPI's world."""

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise DataError(
                "--mpi: MPI cannot be loaded",
                found=error,
                do='pip install "megads[mpi]", or use the MPI of the cluster',
            ) from error
        self._world = MPI.COMM_WORLD
        self.rank = int(self._world.Get_rank())
        self.size = int(self._world.Get_size())

    def gather(self, code: int) -> list[int]:
        """The exit codes of all ranks, once all have come here."""
        return list(self._world.allgather(code))


def run(argv: list[str]) -> int:
    """Run the tool as one process or as a rank; returns its exit code."""
    try:
        team = MpiTeam() if "--mpi" in argv and "--help" not in argv else None
    except DataError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return main(argv, team=team)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
