"""`drex train`: train a small early-exit decoder from text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from drex.cli.common import EXIT_LAYERS_HELP, check_at_least, parse_floats, parse_ints

SMALLEST_VOCABULARY = 257
"""Every byte, and the end of a text."""


def train(
    out: Annotated[Path, typer.Argument(help="Folder to write the checkpoint to.")],
    text: Annotated[list[Path] | None, typer.Option(help="Text file or folder; may be given several times.")] = None,
    stdlib: Annotated[bool, typer.Option("--stdlib", help="Train on Python's own standard library.")] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a tokeniser; without it one is trained on the text.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Size of the tokeniser to train.")] = 4096,
    exits: Annotated[str, typer.Option(help=EXIT_LAYERS_HELP)] = "4,8",
    exit_head: Annotated[str, typer.Option(help="Kind of exit head: shared, norm, linear or mlp.")] = "norm",
    hidden_size: int = 256,
    intermediate_size: int = 768,
    num_layers: int = 12,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    sequence_length: int = 512,
    tokens: Annotated[int, typer.Option(help="Tokens to train on, repeats included.")] = 12_000_000,
    batch_tokens: int = 8192,
    micro_batch_tokens: int = 1024,
    muon_lr: float = 0.02,
    adam_lr: float = 0.003,
    weight_decay: float = 0.05,
    exit_loss: Annotated[str, typer.Option(help="Weighting of the summed loss: ee_llm or layerskip.")] = "ee_llm",
    exit_weights: Annotated[str | None, typer.Option(help="Weights of the exits' losses for ee_llm.")] = None,
    rotate_exits: Annotated[bool, typer.Option(help="One exit a micro-batch (faster) instead of all.")] = True,
    autocast: Annotated[bool | None, typer.Option(help="bfloat16 autocast; by default where it is faster.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the model; needs a C++ compiler.")] = False,
    device: str = "cpu",
    seed: int = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in OUT.")] = False,
) -> None:
    """Train a small early-exit decoder from text and write it as a Hugging Face folder with early_exit.json."""
    from drex.compute.device import has_fast_bfloat16
    from drex.compute.load import pick_device
    from drex.inputs.tokenizer import load_tokenizer
    from drex.tuning.corpus import read_documents, standard_library
    from drex.tuning.interruption import Stopped
    from drex.tuning.recipe import TrainConfig
    from drex.tuning.train import check_folder
    from drex.tuning.train import train as run

    if bool(text) == stdlib:
        raise ValueError("name the text to train on: either --text PATH or --stdlib")
    check_at_least(SMALLEST_VOCABULARY, vocab_size=vocab_size)
    on = pick_device(device)
    config = TrainConfig(
        exits=parse_ints(exits, "--exits"),
        exit_head=exit_head,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        sequence_length=sequence_length,
        tokens=tokens,
        batch_tokens=batch_tokens,
        micro_batch_tokens=micro_batch_tokens,
        muon_lr=muon_lr,
        adam_lr=adam_lr,
        weight_decay=weight_decay,
        exit_loss=exit_loss,
        exit_weights=None if exit_weights is None else parse_floats(exit_weights, "--exit-weights"),
        rotate_exits=rotate_exits,
        autocast=has_fast_bfloat16(on) if autocast is None else autocast,
        compile=compile,
        seed=seed,
    )
    check_folder(out, resume)
    given = vocab_size if tokenizer is None else load_tokenizer(tokenizer)
    if given is None:
        raise ValueError(f"--tokenizer {tokenizer} has no tokeniser: name a folder with a tokenizer.json")
    documents = standard_library() if stdlib else read_documents(text or ())
    try:
        report = run(documents, given, out, config, resume=resume, device=str(on))
    except Stopped as stopped:
        typer.echo(f"drex: {stopped}: go on with the same command and --resume", err=True)
        raise typer.Exit(128 + stopped.signal_number) from None
    typer.echo(json.dumps({"tokens": report.tokens, "epochs": report.epochs, "held_out_loss": report.held_out_loss}))
