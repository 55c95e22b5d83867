"""Learn a SentencePiece vocabulary from text. The work is in megads/data/vocabulary.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from megads.data.vocabulary import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
