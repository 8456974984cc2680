"""`drex serve`: an OpenAI-compatible server around one model."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from drex.cli.common import (
    AdaptiveOption,
    CriterionOption,
    CriterionParametersOption,
    DeviceOption,
    DtypeOption,
    ExitsOption,
    GenerationConfigOption,
    KvFillOption,
    MaxModelLenOption,
    MaxSlowdownOption,
    PolicyOption,
    PolicyParametersOption,
    RunAheadOption,
    ThresholdsOption,
    check_above_zero,
    check_at_least,
    check_share,
    early_exit_from,
    parse_parameters,
)
from drex.config import DEFAULTS
from drex.extras import INSTALL_SERVER
from drex.text_files import read_text

if TYPE_CHECKING:
    from drex.llm import LLM

MOST_PORT = 2**16 - 1
ONEDNN_PRIMITIVES = 256
"""Compiled products that oneDNN keeps: more than a model's shapes of weights times the numbers of rows that they are
compiled for, and fewer than the 1024 that it keeps by itself, at some 0.4 MB each."""
LIBRARIES = ("fastapi", "uvicorn", "uvloop", "h11", "prometheus_client")


def serve(
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder or hub id; none: the bundled model.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 is any that is free.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name that clients use; may be given several times.")
    ] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="Key that opens it; may be given several times.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one key a line.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default the number that is fastest.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="What passes cost: a file of drex profile --out, measured, measure or nominal.")
    ] = None,
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests in flight.")] = DEFAULTS.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Rows a pass may have.")
    ] = DEFAULTS.max_num_batched_tokens,
    kv_cache_tokens: Annotated[int | None, typer.Option(help="Tokens for which there is K/V memory.")] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of the GPU's memory to use, instead of --kv-cache-tokens; 0.9.")
    ] = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="Replay no CUDA graphs.")] = False,
    exits: ExitsOption = None,
    thresholds: ThresholdsOption = None,
    criterion: CriterionOption = None,
    criterion_parameters: CriterionParametersOption = None,
    kv_fill: KvFillOption = None,
    full_depth: Annotated[bool, typer.Option("--full-depth", help="No early exit.")] = False,
    policy: PolicyOption = DEFAULTS.policy,
    policy_parameters: PolicyParametersOption = None,
    run_ahead: RunAheadOption = DEFAULTS.run_ahead,
    max_slowdown: MaxSlowdownOption = None,
    adaptive: AdaptiveOption = DEFAULTS.adaptive,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id, where it is not beside the model.")] = None,
    generation_config: GenerationConfigOption = "auto",
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file, instead of the model's template.")] = None,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; with more, 429.")] = 1024,
    max_body_bytes: Annotated[int, typer.Option(help="Of a request.")] = 4 * 2**20,
    request_timeout: Annotated[float, typer.Option(help="Seconds for a request; then 504.")] = 600.0,
    body_timeout: Annotated[float, typer.Option(help="Seconds for headers or a body, or to take a piece.")] = 30.0,
    shutdown_timeout: Annotated[float, typer.Option(help="Seconds for what is open when told to stop.")] = 25.0,
    allowed_origins: Annotated[
        list[str] | None, typer.Option(help="Origin of pages that may use the server; may be given several times.")
    ] = None,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False,
) -> None:
    """Serve a model to OpenAI's clients; Ctrl-C or SIGTERM finishes what is open and stops."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the server's libraries are missing ({', '.join(missing)}): {INSTALL_SERVER}")
    if not 0 <= port <= MOST_PORT:  # what listens would take the remainder
        raise ValueError(f"--port is {port}: give 1 to {MOST_PORT}, or 0 for any that is free")
    check_at_least(1, threads=threads, max_model_len=max_model_len)
    check_above_zero(gpu_memory_utilization=gpu_memory_utilization)
    check_share(gpu_memory_utilization=gpu_memory_utilization)
    template = None if chat_template is None else _read_template(chat_template)
    # Read when oneDNN multiplies first.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(ONEDNN_PRIMITIVES))
    from drex.compute.load import BUNDLED
    from drex.llm import LLM
    from drex.server.listening import bound
    from drex.server.logs import logging_to_stderr
    from drex.server.run import serve as run
    from drex.server.settings import ServerSettings, read_keys

    settings = ServerSettings(
        served_names=tuple(served_model_name or [model or BUNDLED]),
        api_keys=read_keys(api_key or [], api_key_file),
        max_body_bytes=max_body_bytes,
        max_queue=max_queue,
        request_timeout=request_timeout,
        body_timeout=body_timeout,
        shutdown_timeout=shutdown_timeout,
        allowed_origins=tuple(allowed_origins or ()),
        log_prompts=log_prompts,
    )
    early_exit = early_exit_from(exits, thresholds, criterion, kv_fill, full_depth, criterion_parameters)
    # The address first: loading a model takes long, and may be for nothing.
    with logging_to_stderr(log_format) as log, bound(host, port) as sockets:
        llm = LLM(
            model,
            early_exit=early_exit,
            dtype=dtype,
            device=device,
            policy=policy,
            policy_parameters=parse_parameters(policy_parameters, "--policy-parameters"),
            run_ahead=run_ahead,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_tokens=kv_cache_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            max_slowdown=max_slowdown,
            adaptive=adaptive,
            profile=profile,
            threads=threads,
            tokenizer=tokenizer,
            generation_config=generation_config,
        )
        if template is not None:
            _use_template(llm, template)
        code = run(llm, settings, sockets)
    if log.stuck:
        os._exit(code)
    raise typer.Exit(code)


def _read_template(path: Path) -> str:
    """The text of --chat-template, read before a model is loaded; raises ValueError where there is none."""
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {path} can't be read ({error}): name a Jinja file") from error


def _use_template(llm: LLM, template: str) -> None:
    """Replace the chat template; raises ValueError where there is nothing to replace."""
    if llm.tokenizer is None:
        raise ValueError("--chat-template: the model has no tokeniser; name one with --tokenizer")
    llm.tokenizer.chat_template = template
