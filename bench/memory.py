"""Peak memory of a process that serves with drex, against the sum of what it can't do without.

Run as a script it is the process that is measured; `measure` starts it.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ALLOWANCE = 150 * 10**6
IN_FLIGHT = 8
PROMPT, OUTPUT = 96, 16


def measure(folder: Path, dtype: str) -> dict[str, Any]:
    """Bytes: `peak` of the process; `imports`, `weights`, `kv_pool` and `allowance`, whose sum is the `limit`."""
    imports = _child("imports")["peak"]
    found = _child("drex", str(folder), dtype)
    limit = imports + found["weights"] + found["kv_pool"] + ALLOWANCE
    return {
        **found,
        "imports": imports,
        "allowance": ALLOWANCE,
        "limit": limit,
        "holds": found["peak"] <= limit,
        "in_flight": IN_FLIGHT,
    }


def _child(*words: str) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def peak_bytes() -> int:
    """Largest resident size of this process so far.

    `VmHWM` where there is one: `ru_maxrss` is kept over exec, so that a child of a large process starts with its size.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _only_import() -> dict[str, int]:
    """What importing torch and transformers takes.

    transformers imports lazily: its own modules come in with the first configuration that is made.
    """
    import torch  # noqa: F401
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401

    AutoConfig.for_model("llama")
    return {"peak": peak_bytes()}


def _serve(folder: str, dtype: str) -> dict[str, int]:
    """Load a model with its own exit settings and generate, every byte of its K/V pool touched."""
    from drex import LLM, SamplingParams
    from drex.compute.linear import PackedLinear
    from drex.engine.torch_executor import TorchExecutor

    llm = LLM(folder, dtype=dtype, max_num_seqs=IN_FLIGHT, max_model_len=368, profile="measure")
    executor, model = llm.engine.executor, llm.model
    assert isinstance(executor, TorchExecutor)
    pool = executor.runner.pool
    pool.keys.zero_()
    pool.values.zero_()
    draw = random.Random(0)
    prompts = [[draw.randrange(3, model.decoder.spec.vocab_size) for _ in range(PROMPT)] for _ in range(IN_FLIGHT)]
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True), use_tqdm=False)
    heads = [parameter.nbytes for head, _ in model.heads for parameter in head.parameters()]
    heads += [m.weight_bytes for head, _ in model.heads for m in head.modules() if isinstance(m, PackedLinear)]
    return {
        "peak": peak_bytes(),
        "weights": model.decoder.weight_bytes + sum(heads),
        "kv_pool": pool.keys.nbytes + pool.values.nbytes,
    }


if __name__ == "__main__":
    print(json.dumps(_only_import() if sys.argv[1] == "imports" else _serve(*sys.argv[2:4])))
