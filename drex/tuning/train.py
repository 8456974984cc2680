"""Training of a small early-exit decoder from text: what `drex train` does.

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
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from drex.checkpoint import EXIT_WEIGHTS_FILE, EarlyExitFile, ExitSpec, write_early_exit
from drex.compute.heads import ExitHead
from drex.tuning.corpus import Blocks, Document, split_held_out, tokenize, train_tokenizer
from drex.tuning.losses import exit_loss_weights
from drex.tuning.optim import Muon

CHECKPOINT_SECONDS = 300.0
UNCALIBRATED_THRESHOLD = 0.9


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. Sizes in tokens; learning rates are peaks of a warm-up and cosine schedule down to a fiftieth."""

    exits: tuple[int, ...] = (4, 8)
    exit_head: str = "norm"
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 12
    num_heads: int = 4
    num_kv_heads: int = 2
    sequence_length: int = 512
    tokens: int = 12_000_000
    batch_tokens: int = 8192
    micro_batch_tokens: int = 1024
    muon_lr: float = 0.02
    adam_lr: float = 0.003
    weight_decay: float = 0.05
    warmup_share: float = 0.02
    exit_loss: str = "ee_llm"
    exit_weights: tuple[float, ...] | None = None
    rotate_exits: bool = True
    held_out_share: float = 0.02
    held_out_tokens: int = 131_072
    autocast: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.exits or list(self.exits) != sorted(set(self.exits)) or self.exits[0] < 1:
            raise ValueError(f"exits {self.exits}: name at least one layer count, ascending, from 1 on")
        if self.exits[-1] >= self.num_layers:
            raise ValueError(f"exit after layer {self.exits[-1]}: the model has {self.num_layers}, so exits end before")
        if self.batch_tokens % self.micro_batch_tokens or self.micro_batch_tokens % self.sequence_length:
            raise ValueError(
                "batch_tokens must be a multiple of micro_batch_tokens, and that one of sequence_length "
                f"(got {self.batch_tokens}, {self.micro_batch_tokens}, {self.sequence_length})"
            )
        if self.tokens < self.batch_tokens:
            raise ValueError(f"tokens {self.tokens}: train on at least one batch of {self.batch_tokens}")

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens


class EarlyExitModel(nn.Module):
    """A Hugging Face Llama with exit heads, for training."""

    def __init__(self, config: TrainConfig, vocab_size: int, eos_token_id: int) -> None:
        super().__init__()
        self.exits = config.exits
        self.hf = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                max_position_embeddings=config.sequence_length,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=eos_token_id,
                use_cache=False,
            )
        )
        eps = self.hf.config.rms_norm_eps
        self.heads = nn.ModuleList(
            ExitHead(config.exit_head, config.hidden_size, config.intermediate_size, vocab_size, eps)
            for _ in config.exits
        )
        for head in self.heads:
            assert isinstance(head, ExitHead)
            head.start_from(self.hf.model.norm.weight, self.hf.lm_head.weight)

    def losses(self, blocks: Tensor, exits: Sequence[int]) -> list[Tensor]:
        """Mean cross-entropy in nats a token at the given exits (indices), then at the end. blocks: (batch, n + 1)."""
        inputs, targets = blocks[:, :-1], blocks[:, 1:].reshape(-1)
        model = self.hf.model
        hidden = model.embed_tokens(inputs)
        positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
        rotary = model.rotary_emb(hidden, positions)
        out: list[Tensor] = []
        wanted = {self.exits[i]: i for i in exits}
        for count, layer in enumerate(model.layers, 1):
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            if count in wanted:
                head = self.heads[wanted[count]]
                logits = head(hidden, model.norm, self.hf.lm_head.weight)
                out.append(F.cross_entropy(logits.flatten(0, 1).float(), targets))
        logits = self.hf.lm_head(model.norm(hidden))
        out.append(F.cross_entropy(logits.flatten(0, 1).float(), targets))
        return out


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
    training, held_out = split_held_out(documents, config.held_out_share)
    if resume:
        tokenizer = AutoTokenizer.from_pretrained(out)
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
    torch.manual_seed(config.seed)
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    run = _Run(config, EarlyExitModel(config, len(tokenizer), eos).to(device), train_blocks, folder, device)
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
    _write_checkpoint(run.model, Path(out), config.exit_head)
    (folder / "report.json").write_text(json.dumps({**asdict(report), "config": asdict(config)}, indent=2) + "\n")
    _plot(folder / "log.jsonl", folder / "loss.png")
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


def _write_checkpoint(model: EarlyExitModel, out: Path, head: str) -> None:
    model.to(torch.bfloat16)
    model.hf.config.use_cache = True
    model.hf.save_pretrained(out)
    weights = {
        f"exits.{layer}.{name}": tensor.to(torch.bfloat16).contiguous()
        for layer, exit_head in zip(model.exits, model.heads, strict=True)
        for name, tensor in exit_head.state_dict().items()
    }
    if weights:
        save_file(weights, out / EXIT_WEIGHTS_FILE)
    exits = tuple(ExitSpec(layer, head, EXIT_WEIGHTS_FILE if weights else None) for layer in model.exits)
    thresholds = (UNCALIBRATED_THRESHOLD,) * len(exits)
    write_early_exit(out, EarlyExitFile(exits=exits, criterion="max_prob", thresholds=thresholds))


def _plot(log: Path, picture: Path) -> None:
    """Draw the training losses; needs matplotlib, which the `train` extra installs, and is left out without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    records = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key in sorted({key for record in records for key in record} - {"step", "tokens"}):
        points = [(record["tokens"] / 1e6, record[key]) for record in records if key in record]
        label = "final" if key == "loss" else key.replace("_", " after layer ")
        axes.plot(*zip(*points, strict=True), label=label, lw=0.8)
    axes.set(xlabel="tokens seen (millions)", ylabel="training loss (nats a token)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)
