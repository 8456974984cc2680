"""Training of a small early-exit decoder from text: what `drex train` does, from the text to the finished folder.

Writes an ordinary Hugging Face folder (which `transformers` loads) with `early_exit.json` and the exit heads' weights
beside it, and `training/` with the log, the loss plot and the checkpoint that an interrupted run resumes from.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from drex.tokenizer import load_tokenizer
from drex.tuning.corpus import Blocks, Document, split_held_out, tokenize, train_tokenizer
from drex.tuning.losses import exit_loss_weights
from drex.tuning.model import EarlyExitModel, write_checkpoint
from drex.tuning.optim import Muon
from drex.tuning.plot import plot_losses
from drex.tuning.recipe import TrainConfig

CHECKPOINT_SECONDS = 300.0


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
    console: Console | None = None,
) -> TrainReport:
    """Train on `documents` and write the checkpoint to `out`.

    Args:
        documents: training text; a share of it, chosen by document name, is held out.
        tokenizer: with an end-of-text token, or the vocabulary size of one to train on the text.
        out: folder to write; must be new or empty unless `resume`.
        config: the recipe.
        resume: go on from the checkpoint in `out`.
        device: torch device to train on.
        console: where progress goes.

    Raises:
        ValueError: too little text, an `out` in use, or a checkpoint of another recipe.
    """
    config = config or TrainConfig()
    folder = _prepare(Path(out), resume)
    vocabulary, train_blocks, test_blocks = _read(documents, tokenizer, Path(out), config, resume)
    torch.manual_seed(config.seed)
    eos = vocabulary.eos_token_id
    assert isinstance(eos, int)
    run = _Run(config, EarlyExitModel(config, len(vocabulary), eos).to(device), train_blocks, folder, device)
    if resume:
        run.load()
    run.loop(console or Console(stderr=True))
    held_out_loss = run.evaluate(test_blocks)
    report = TrainReport(
        tokens=run.step * config.batch_tokens,
        epochs=run.step * config.batch_tokens / len(train_blocks.ids),
        parameters=sum(p.numel() for p in run.model.parameters()),
        held_out_loss=held_out_loss,
        hours=run.seconds / 3600,
    )
    write_checkpoint(run.model, Path(out), config.exit_head)
    (folder / "report.json").write_text(json.dumps({**asdict(report), "config": asdict(config)}, indent=2) + "\n")
    plot_losses(folder / "log.jsonl", folder / "loss.png")
    return report


def _prepare(out: Path, resume: bool) -> Path:
    folder = out / "training"
    if resume and not (folder / "checkpoint.pt").is_file():
        raise ValueError(f"nothing to resume in {out}: it has no training/checkpoint.pt; leave out --resume")
    if not resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: name a new folder, or pass --resume to go on with the run in it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {out} ({error.strerror}): name a folder that you may write to") from error
    return folder


def _read(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase | int,
    out: Path,
    config: TrainConfig,
    resume: bool,
) -> tuple[PreTrainedTokenizerBase, Blocks, Blocks]:
    """The tokeniser, which it writes to `out`, and the blocks to train on and to measure on."""
    training, held_out = split_held_out(documents, config.held_out_share)
    if resume:
        kept = load_tokenizer(out)
        if kept is None:
            raise ValueError(f"{out} has lost its tokeniser, which the run was begun with: start again in a new folder")
        tokenizer = kept
    elif isinstance(tokenizer, int):
        tokenizer = train_tokenizer(training, tokenizer)
    assert not isinstance(tokenizer, int)
    tokenizer.save_pretrained(out)
    train_blocks = Blocks(tokenize(training, tokenizer), config.sequence_length)
    test_blocks = Blocks(tokenize(held_out, tokenizer), config.sequence_length)
    if not len(train_blocks) or not len(test_blocks):
        raise ValueError(
            f"too little text: {len(train_blocks.ids)} training and {len(test_blocks.ids)} held-out tokens, and a "
            f"block takes {config.sequence_length}; add documents or raise held_out_share"
        )
    return tokenizer, train_blocks, test_blocks


class _Run:
    """One training run: model, optimisers, position in the data, log."""

    def __init__(self, config: TrainConfig, model: EarlyExitModel, blocks: Blocks, folder: Path, device: str) -> None:
        self.config, self.model, self.blocks, self.folder, self.device = config, model, blocks, folder, device
        self.step, self.seconds = 0, 0.0
        self.weights = exit_loss_weights(config.exit_loss, config.exits, config.num_layers, config.exit_weights)
        matrices = [p for p in model.hf.model.layers.parameters() if p.ndim == 2]
        inside = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in inside]
        muon = Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
        adam = torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        self.optimizers: list[torch.optim.Optimizer] = [muon, adam]
        self.peaks = [config.muon_lr, config.adam_lr]
        losses: Callable[[Tensor, Sequence[int]], list[Tensor]] = model.losses
        self.losses = torch.compile(losses) if config.compile else losses

    def loop(self, console: Console) -> None:
        config = self.config
        batch_blocks = config.batch_tokens // config.sequence_length
        order = islice(self.blocks.order(config.seed), self.step * batch_blocks, None)
        saved = time.monotonic()
        columns = (TextColumn("training"), BarColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress, (self.folder / "log.jsonl").open("a") as log:
            task = progress.add_task("train", total=config.steps, completed=self.step, status="")
            while self.step < config.steps:
                started = time.monotonic()
                record = self._train_step(islice(order, batch_blocks))
                now = time.monotonic()
                self.seconds += now - started
                log.write(json.dumps(record) + "\n")
                log.flush()
                rate = config.batch_tokens / (now - started)
                status = f"step {self.step}/{config.steps}  loss {record['loss']:.3f}  {rate:,.0f} tokens/s"
                progress.update(task, completed=self.step, status=status)
                if now - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = now
        self.save()

    def _train_step(self, numbers: Iterator[int]) -> dict[str, float]:
        config = self.config
        batch = torch.from_numpy(self.blocks.batch(numbers)).long().to(self.device)
        micro_batches = batch.split(config.micro_batch_tokens // config.sequence_length)
        exits = range(len(config.exits))
        totals = [0.0] * (len(exits) + 1)
        counts = [0] * (len(exits) + 1)
        for number, blocks in enumerate(micro_batches):
            # LayerSkip's rotational curriculum: one exit a micro-batch, its weight scaled so that the sum is unbiased.
            active = [(self.step + number) % len(exits)] if config.rotate_exits else list(exits)
            with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=config.autocast):
                losses = self.losses(blocks, active)
            scale = len(exits) / len(active)
            weights = [self.weights[i] * scale for i in active] + [self.weights[-1]]
            total = torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()
            total.backward()
            for i, loss in zip([*active, len(exits)], losses, strict=True):
                totals[i] += loss.item()
                counts[i] += 1
        self._update(len(micro_batches))
        self.step += 1
        means = [t / c if c else math.nan for t, c in zip(totals, counts, strict=True)]
        record = {f"exit_{layer}": mean for layer, mean in zip(config.exits, means[:-1], strict=True) if mean == mean}
        return {"step": self.step, "tokens": self.step * config.batch_tokens, "loss": means[-1], **record}

    def _update(self, micro_batches: int) -> None:
        parameters = list(self.model.parameters())
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(micro_batches)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * self._schedule()
            optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def _schedule(self) -> float:
        """Linear warm-up, then a cosine from 1 down to 0.02."""
        warmup = max(1, round(self.config.warmup_share * self.config.steps))
        if self.step < warmup:
            return (self.step + 1) / warmup
        progress = (self.step - warmup) / max(1, self.config.steps - warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))

    @torch.no_grad()
    def evaluate(self, blocks: Blocks) -> dict[str, float]:
        count = max(1, min(len(blocks), self.config.held_out_tokens // self.config.sequence_length))
        totals = [0.0] * (len(self.config.exits) + 1)
        for number in range(count):
            batch = torch.from_numpy(blocks.batch([number])).long().to(self.device)
            for i, loss in enumerate(self.model.losses(batch, range(len(self.config.exits)))):
                totals[i] += loss.item()
        names = [f"exit_{layer}" for layer in self.config.exits] + ["final"]
        return {name: total / count for name, total in zip(names, totals, strict=True)}

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "config": json.dumps(asdict(self.config)),
        }
        part = self.folder / "checkpoint.pt.part"
        torch.save(state, part)
        os.replace(part, self.folder / "checkpoint.pt")

    def load(self) -> None:
        state: dict[str, Any] = torch.load(self.folder / "checkpoint.pt", weights_only=True, map_location=self.device)
        speed_only = {"compile", "autocast", "micro_batch_tokens"}
        was = {k: v for k, v in json.loads(state["config"]).items() if k not in speed_only}
        now = {k: v for k, v in json.loads(json.dumps(asdict(self.config))).items() if k not in speed_only}
        if was != now:
            changed = sorted(key for key in now if was.get(key) != now[key])
            raise ValueError(f"the checkpoint was made with another {', '.join(changed)}: resume with the same recipe")
        self.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.step, self.seconds = state["step"], state["seconds"]
        log = self.folder / "log.jsonl"
        log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[: self.step]))
