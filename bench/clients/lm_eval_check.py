"""lm_eval over HTTP against the Python API: log-likelihoods, greedy flags, generated text and scores must be the same.

    python bench/clients/lm_eval_check.py --lm-eval /path/to/bin/lm_eval

lm_eval (`pip install "lm_eval[api]" transformers`, in an environment of its own) talks to `drex serve` with the bundled
model, float32: `local-completions` for log-likelihoods and generation, `local-chat-completions` for generation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from served import Served, served  # noqa: E402

from drex import LLM, SamplingParams  # noqa: E402
from drex.compute.load import BUNDLED, find_model  # noqa: E402

STOP = ("\n\n", "#")


def evaluate(lm_eval: Path, server: Served, kind: str, tasks: str, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Run lm_eval; returns its samples by task."""
    path = "chat/completions" if kind == "local-chat-completions" else "completions"
    args = f"model={BUNDLED},base_url={server.address}/v1/{path},num_concurrent=4"
    if path == "completions":
        args += f",tokenized_requests=True,tokenizer={find_model(None)},max_length=512"
    command = [
        *(str(lm_eval), "--model", kind, "--model_args", args, "--tasks", tasks, "--include_path", str(HERE)),
        *("--log_samples", "--output_path", str(out), "--batch_size", "4"),
        *(("--apply_chat_template",) if path == "chat/completions" else ()),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "any"}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"lm_eval failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    for file in out.rglob("results_*.json"):
        for task, scores in json.loads(file.read_text(encoding="utf-8"))["results"].items():
            print(kind, task, {name: value for name, value in scores.items() if isinstance(value, float)})
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(out.rglob("samples_*.jsonl")):
        task = file.name.removeprefix("samples_").rsplit("_", 1)[0]
        found[task] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return found


def log_likelihood(llm: LLM, context: str, continuation: str) -> tuple[float, bool]:
    """As lm_eval defines it: of the continuation's tokens, and whether each was the most likely one.

    Spaces at the context's end belong to the continuation, whose tokens are those that follow as many as the context
    alone has.
    """
    whole, given = llm.inputs.encode(context + continuation), llm.inputs.encode(context.rstrip())
    rest, start = whole[len(given) :], len(given) - 1
    [scored] = llm.score(given + rest)
    best = all(a == b for a, b in zip(scored.best[start:], rest, strict=True))
    return sum(scored.logprobs[start:]), best


def compare(llm: LLM, samples: dict[str, list[dict[str, Any]]], chat: bool) -> int:
    """How many answers were compared; raises SystemExit for one that differs."""
    count = 0
    params = SamplingParams(temperature=0, max_tokens=16, stop=STOP)
    for sample in samples.get("drex_choice", ()):
        doc = sample["doc"]
        for choice, answer in zip(doc["choices"], sample["filtered_resps"], strict=True):
            expected, best = log_likelihood(llm, doc["prompt"], choice)
            given, greedy = float(answer[0]), str(answer[1]) == "True"
            if abs(given - expected) > 1e-4 or greedy != best:
                raise SystemExit(f"{doc['prompt']!r} + {choice!r}: {answer} over HTTP, {expected, best} in Python")
            count += 1
    for sample in samples.get("drex_generate", ()):
        prompt = sample["doc"]["prompt"]
        messages = [{"role": "user", "content": prompt}]
        [output] = llm.chat(messages, params) if chat else llm.generate(prompt, params)
        text = output.outputs[0].text
        if sample["resps"][0][0] != text:
            raise SystemExit(f"{prompt!r}: {sample['resps'][0][0]!r} over HTTP, {text!r} in Python")
        count += 1
    return count


def main() -> None:
    """Read the arguments, run lm_eval twice, compare."""
    parser = argparse.ArgumentParser(description="lm_eval over HTTP against the Python API.")
    parser.add_argument("--lm-eval", type=Path, required=True, help="The lm_eval command.")
    given = parser.parse_args()
    llm = LLM(dtype="float32")
    runs = (("local-completions", "drex_choice,drex_generate"), ("local-chat-completions", "drex_generate"))
    with served("--dtype", "float32") as server:
        for kind, tasks in runs:
            with tempfile.TemporaryDirectory() as out:
                samples = evaluate(given.lm_eval, server, kind, tasks, Path(out))
            print(f"{kind}: {compare(llm, samples, kind.startswith('local-chat'))} answers are those of the Python API")


if __name__ == "__main__":
    main()
