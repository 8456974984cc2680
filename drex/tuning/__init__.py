"""Library functions behind `drex train` and its siblings: they make and measure early-exit checkpoints."""
