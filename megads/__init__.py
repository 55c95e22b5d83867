"""megads: a Megatron-style trainer for large language models, laid out floor by floor (see README, "The house")."""

__version__ = "0.1.0"
