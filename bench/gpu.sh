#!/usr/bin/env bash
# Everything about drex that only a CUDA GPU can tell: parity, speed, tables, charts. Under 8 minutes; --long: the grid.
#
#   bench/gpu.sh [--out FOLDER] [--long] [--only parity,decode,...]
#
# Needs torch, triton, transformers, numpy, safetensors, tokenizers and rich; vLLM is compared with where it is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/bench" PYTHONUNBUFFERED=1
exec python3 bench/gpu.py "$@"
