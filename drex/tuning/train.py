"""Training of a small early-exit decoder from text: what `drex train` does, from the text to the finished folder.

Writes an ordinary Hugging Face folder (which `transformers` loads) with `early_exit.json` and the exit heads' weights
beside it, and `training/` with the log, the loss plot and the checkpoint that an interrupted run resumes from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch
from transformers import PreTrainedTokenizerBase

from drex.inputs.tokenizer import load_tokenizer
from drex.tuning.corpus import Blocks, Document, split_held_out, tokenize, train_tokenizer
from drex.tuning.model import EarlyExitModel, write_checkpoint
from drex.tuning.plot import plot_losses
from drex.tuning.recipe import TrainConfig
from drex.tuning.run import CHECKPOINT, TrainingRun

TRAINING = "training"
"""Folder of the log, the checkpoint and the report, in the folder of the model."""
BEGINNING = {TRAINING, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
TRAINING_BEGINNING = {"log.jsonl", f"{CHECKPOINT}.part"}
"""All that a run has written before its first checkpoint, which holds nothing that anybody could miss."""


@dataclass
class TrainReport:
    """What a finished run measured: nats a token on the held-out documents, per exit and at the end."""

    tokens: int
    epochs: float
    parameters: int
    held_out_loss: dict[str, float]
    hours: float


def train(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase | int,
    out: str | Path,
    config: TrainConfig | None = None,
    *,
    resume: bool = False,
    device: str = "cpu",
    file: TextIO | None = None,
) -> TrainReport:
    """Train on `documents` and write the checkpoint to `out`, which is made once the text has been read.

    Args:
        documents: training text; a share of it, chosen by document name, is held out.
        tokenizer: with an end-of-text token, or the vocabulary size of one to train on the text.
        out: folder to write; must be new or empty unless `resume`.
        config: the recipe.
        resume: go on from the checkpoint in `out`.
        device: torch device to train on.
        file: where progress goes; None is standard error.

    Raises:
        ValueError: too little text, an `out` in use, or a checkpoint of another recipe.
        Stopped: Ctrl-C or SIGTERM came; what was trained until then is saved, and `resume` goes on from there.
    """
    config, out = config or TrainConfig(), Path(out)
    check_folder(out, resume)
    vocabulary, train_blocks, test_blocks = _read(documents, tokenizer, out, config, resume)
    torch.manual_seed(config.seed)
    eos = vocabulary.eos_token_id
    assert isinstance(eos, int)
    folder = out / TRAINING
    run = TrainingRun(
        config, EarlyExitModel(config, len(vocabulary), eos).to(device), train_blocks, folder, device, file
    )
    if resume:
        run.load()
    else:
        vocabulary.save_pretrained(out)
        (folder / "log.jsonl").unlink(missing_ok=True)
        run.save()  # from here on --resume goes on
    run.loop()
    held_out_loss = run.evaluate(test_blocks)
    report = TrainReport(
        tokens=run.step * config.batch_tokens,
        epochs=run.step * config.batch_tokens / len(train_blocks.ids),
        parameters=sum(p.numel() for p in run.model.parameters()),
        held_out_loss=held_out_loss,
        hours=run.seconds / 3600,
    )
    write_checkpoint(run.model, out, config.exit_head)
    (folder / "report.json").write_text(json.dumps({**asdict(report), "config": asdict(config)}, indent=2) + "\n")
    plot_losses(folder / "log.jsonl", folder / "loss.png")
    return report


def check_folder(out: Path, resume: bool) -> None:
    """Raise ValueError for a folder that a run can't go on in, begin in, or write to; nothing is left behind.

    Args:
        out: folder of the model.
        resume: whether a run is to go on in it.
    """
    saved = (out / TRAINING / CHECKPOINT).is_file()
    if resume and not saved:
        remedy = "leave out --resume to start one there" if _free(out) else "start one in a new folder"
        raise ValueError(f"nothing to resume in {out}: it has no {TRAINING}/{CHECKPOINT}; {remedy}")
    if not resume and not _free(out):
        remedy = ", or pass --resume to go on with the run in it" if saved else ""
        raise ValueError(f"{out} is not empty: name a new folder{remedy}")
    missing = [folder for folder in (out / TRAINING, *(out / TRAINING).parents) if not folder.exists()]
    try:
        (out / TRAINING).mkdir(parents=True, exist_ok=True)
        (out / TRAINING / f"{CHECKPOINT}.part").touch()
        (out / TRAINING / f"{CHECKPOINT}.part").unlink()
        for folder in missing:
            folder.rmdir()
    except OSError as error:
        raise ValueError(f"cannot write to {out} ({error.strerror}): name a folder that you may write to") from error


def _free(out: Path) -> bool:
    """Whether a run may begin in a folder: it isn't there, is empty, or holds a beginning without a checkpoint."""
    if not out.is_dir():
        return not out.exists()
    inside = {path.name for path in out.iterdir()}
    training = {path.name for path in (out / TRAINING).iterdir()} if (out / TRAINING).is_dir() else set()
    return not inside or (TRAINING in inside and inside <= BEGINNING and training <= TRAINING_BEGINNING)


def _read(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase | int,
    out: Path,
    config: TrainConfig,
    resume: bool,
) -> tuple[PreTrainedTokenizerBase, Blocks, Blocks]:
    """The tokeniser, and the blocks to train on and to measure on."""
    training, held_out = split_held_out(documents, config.held_out_share)
    vocabulary: PreTrainedTokenizerBase | None
    if resume:
        vocabulary = load_tokenizer(out)
        if vocabulary is None:
            raise ValueError(f"{out} has lost its tokeniser, which the run was begun with: start again in a new folder")
    else:
        vocabulary = train_tokenizer(training, tokenizer) if isinstance(tokenizer, int) else tokenizer
    train_blocks = Blocks(tokenize(training, vocabulary), config.sequence_length)
    test_blocks = Blocks(tokenize(held_out, vocabulary), config.sequence_length)
    if not len(train_blocks) or not len(test_blocks):
        raise ValueError(
            f"too little text: {len(train_blocks.ids)} training and {len(test_blocks.ids)} held-out tokens, and a "
            f"block takes {config.sequence_length}; add documents, {config.held_out_share:.0%} of which are held out"
        )
    return vocabulary, train_blocks, test_blocks
