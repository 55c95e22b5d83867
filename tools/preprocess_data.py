"""Text to a tokenized corpus in Megatron's format. The work is in megads/data/preprocess.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from megads.data.preprocess import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
