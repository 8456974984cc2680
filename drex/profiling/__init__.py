"""What the passes of a model take on this machine: measured, estimated, kept."""
