"""One training run: model, optimisers, position in the data, log, and the checkpoint that it resumes from."""

from __future__ import annotations

import json
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from drex.progress import Progress
from drex.tuning.corpus import Blocks
from drex.tuning.interruption import Interruption, Stopped
from drex.tuning.losses import exit_loss_weights
from drex.tuning.model import EarlyExitModel
from drex.tuning.optim import Muon
from drex.tuning.recipe import TrainConfig

CHECKPOINT_SECONDS = 300.0
CHECKPOINT = "checkpoint.pt"


class TrainingRun:
    """One training run: model, optimisers, position in the data, log.

    Args:
        config: the recipe.
        model: to train; on `device`.
        blocks: of tokens to train on.
        folder: for the log and the checkpoint; made by the first `save`.
        device: torch device to train on.
        file: where progress goes; None is standard error.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: EarlyExitModel,
        blocks: Blocks,
        folder: Path,
        device: str,
        file: TextIO | None = None,
    ) -> None:
        self.config, self.model, self.blocks, self.folder, self.device = config, model, blocks, folder, device
        self._file = file
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

    def loop(self) -> None:
        """Train to the end of the recipe, and save.

        Raises:
            Stopped: Ctrl-C or SIGTERM came; what was trained until then is saved.
        """
        config = self.config
        batch_blocks = config.batch_tokens // config.sequence_length
        order = islice(self.blocks.order(config.seed), self.step * batch_blocks, None)
        saved = time.monotonic()
        left = config.steps - self.step
        progress = Progress("training", left, file=self._file)
        with progress, (self.folder / "log.jsonl").open("a") as log, Interruption() as interruption:
            while self.step < config.steps and interruption.signal_number is None:
                started = time.monotonic()
                record = self._train_step(islice(order, batch_blocks))
                now = time.monotonic()
                self.seconds += now - started
                log.write(json.dumps(record) + "\n")
                log.flush()
                rate = config.batch_tokens / (now - started)
                status = f"step {self.step} of {config.steps}, loss {record['loss']:.3f}, {rate:,.0f} tokens/s"
                progress.advance(status=status)
                if now - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = now
        self.save()
        if interruption.signal_number is not None:
            raise Stopped(f"stopped after step {self.step} of {config.steps}, saved", interruption.signal_number)

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
        """Mean loss of held-out blocks in nats a token, by exit and at the end."""
        count = max(1, min(len(blocks), self.config.held_out_tokens // self.config.sequence_length))
        totals = [0.0] * (len(self.config.exits) + 1)
        with Progress("measuring the held-out loss", count, file=self._file) as progress:
            for number in range(count):
                batch = torch.from_numpy(blocks.batch([number])).long().to(self.device)
                for i, loss in enumerate(self.model.losses(batch, range(len(self.config.exits)))):
                    totals[i] += loss.item()
                progress.advance()
        names = [f"exit_{layer}" for layer in self.config.exits] + ["final"]
        return {name: total / count for name, total in zip(names, totals, strict=True)}

    def save(self) -> None:
        """Write the checkpoint; the one before it stays until the new one is whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "config": json.dumps(asdict(self.config)),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{CHECKPOINT}.part"
        torch.save(state, part)
        os.replace(part, self.folder / CHECKPOINT)

    def load(self) -> None:
        """Go on from the checkpoint; raises ValueError for one of another recipe, or one that can't be read."""
        path = self.folder / CHECKPOINT
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location=self.device)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            why = str(error).partition("\n")[0]
            raise ValueError(f"{path} can't be read ({why}): start again in a new folder") from error
        speed_only = {"compile", "autocast", "micro_batch_tokens"}
        was = {k: v for k, v in json.loads(state["config"]).items() if k not in speed_only}
        now = {k: v for k, v in json.loads(json.dumps(asdict(self.config))).items() if k not in speed_only}
        if was != now:
            changed = sorted(key for key in now if was.get(key) != now[key])
            raise ValueError(
                f"the checkpoint was made with another {', '.join(changed)}: resume with the same recipe, or start in "
                "a new folder"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.step, self.seconds = state["step"], state["seconds"]
        log = self.folder / "log.jsonl"
        kept = log.read_text().splitlines()[: self.step] if log.is_file() else []
        log.write_text("".join(line + "\n" for line in kept))
