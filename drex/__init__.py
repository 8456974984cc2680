"""drex: the serving engine for early-exit language models."""
