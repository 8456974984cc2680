"""Early-exit decoding the plain way: one request, one position at a time, every formula spelled out, in float64.

Shares no code with the engine but the sampling noise, which is part of the contract. Reads its weights from the files.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from drex.compute.noise import gumbel
from drex.control.hashing import mix, uniform
from drex.sampling_params import SamplingParams


@dataclass
class RefToken:
    """What the reference says of one generated token."""

    token: int
    exit_layer: int
    confidence: float
    logprob: float
    checks: list[tuple[int, float, float]]  # exit layer, confidence, threshold


@dataclass
class Rule:
    """Exit settings of one request: thresholds by exit layer (None: not allowed)."""

    criterion: str
    thresholds: dict[int, float | None]
    patience: int = 2
    schedule: str = "constant"

    def threshold(self, layer: int, output_index: int, max_tokens: int) -> float | None:
        base = self.thresholds[layer]
        if base is None or base > 1:
            return None
        decay = math.exp(-4 * output_index / max_tokens)
        if self.schedule == "calm_paper":
            return max(0.0, min(1.0, 0.9 * base + 0.1 * decay))
        if self.schedule == "calm_code":
            return base * (0.9 + 0.1 * decay)
        return base


class Reference:
    """A decoder of the Llama family with K/V kept per layer and position; None marks an absent entry."""

    def __init__(self, folder: Path, exits: tuple[int, ...], fill: str) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.w = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
        extra = folder / "early_exit/heads.safetensors"
        self.exit_w = {k: v.double() for k, v in load_file(extra).items()} if extra.is_file() else {}
        self.exits, self.fill = exits, fill
        self.layers = self.config["num_hidden_layers"]
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.head_dim = self.config.get("head_dim") or self.config["hidden_size"] // self.heads
        theta = self.config["rope_parameters"]["rope_theta"]
        inv = 1.0 / theta ** (torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)
        self.inv_freq = inv
        self.kv: list[list[tuple[Tensor, Tensor] | None]] = []

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean() + self.config["rms_norm_eps"]).sqrt() * weight

    def rotate(self, x: Tensor, position: int) -> Tensor:
        angles = position * self.inv_freq
        cos, sin = angles.cos().double(), angles.sin().double()
        half = self.head_dim // 2
        a, b = x[:, :half], x[:, half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=1)

    def key_value(self, layer: int, hidden: Tensor, position: int) -> tuple[Tensor, Tensor]:
        p = f"model.layers.{layer}."
        x = self.norm(hidden, self.w[p + "input_layernorm.weight"])
        k = (self.w[p + "self_attn.k_proj.weight"] @ x).view(self.kv_heads, self.head_dim)
        v = (self.w[p + "self_attn.v_proj.weight"] @ x).view(self.kv_heads, self.head_dim)
        return self.rotate(k, position), v

    def layer(self, layer: int, hidden: Tensor, position: int) -> Tensor:
        p = f"model.layers.{layer}."
        self.kv[layer].append(self.key_value(layer, hidden, position))
        x = self.norm(hidden, self.w[p + "input_layernorm.weight"])
        q = self.rotate((self.w[p + "self_attn.q_proj.weight"] @ x).view(self.heads, self.head_dim), position)
        seen = [entry for entry in self.kv[layer] if entry is not None]
        keys = torch.stack([k for k, _ in seen]).repeat_interleave(self.heads // self.kv_heads, dim=1)
        values = torch.stack([v for _, v in seen]).repeat_interleave(self.heads // self.kv_heads, dim=1)
        scores = torch.einsum("hd,nhd->hn", q, keys) / math.sqrt(self.head_dim)
        out = torch.einsum("hn,nhd->hd", torch.softmax(scores, 1), values).reshape(-1)
        hidden = hidden + self.w[p + "self_attn.o_proj.weight"] @ out
        x = self.norm(hidden, self.w[p + "post_attention_layernorm.weight"])
        gate = self.w[p + "mlp.gate_proj.weight"] @ x
        up = self.w[p + "mlp.up_proj.weight"] @ x
        return hidden + self.w[p + "mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    def logits(self, hidden: Tensor, exit_layer: int) -> Tensor:
        norm = self.exit_w.get(f"exits.{exit_layer}.norm.weight", self.w["model.norm.weight"])
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return head @ self.norm(hidden, norm)

    def confidence(
        self, criterion: str, logits: Tensor, hidden: Tensor, before: Tensor, where: tuple[int, ...], run: float
    ) -> float:
        exit_layer = where[0]
        p = torch.softmax(logits, 0)
        if exit_layer == self.layers and criterion not in ("max_prob", "margin", "entropy"):
            criterion = "max_prob"
        if criterion == "max_prob":
            value = p.max().item()
        elif criterion == "margin":
            first, second = p.sort(descending=True).values[:2].tolist()
            value = first - second
        elif criterion == "entropy":
            value = 1 + (p * p.log()).sum().item() / math.log(len(p))
        elif criterion == "state":
            value = (hidden @ before / hidden.norm() / before.norm()).item()
        elif criterion == "patience":
            value = run
        elif criterion == "probe":
            w, b = self.exit_w[f"exits.{exit_layer}.probe.weight"], self.exit_w[f"exits.{exit_layer}.probe.bias"]
            value = torch.softmax(w @ hidden + b, 0)[1].item()
        else:
            seed, sample, position = where[1:]
            value = uniform(seed, sample, position, self.exits.index(exit_layer)).item()
        return max(0.0, min(1.0, value))

    def generate(self, prompt: list[int], params: SamplingParams, rule: Rule, seed: int, sample: int) -> list[RefToken]:
        """All tokens of one request. Afterwards `kv` holds every layer's entries."""
        self.kv = [[] for _ in range(self.layers)]
        tokens, out = list(prompt), []
        for position in range(len(prompt) + params.max_tokens - 1):
            hidden = before = self.w["model.embed_tokens.weight"][tokens[position]]
            drawn = position >= len(prompt) - 1
            may_exit = position >= len(prompt)
            checks: list[tuple[int, float, float]] = []
            emitted: RefToken | None = None
            last_argmax, run = -1, 0
            for layer in range(self.layers):
                if emitted is not None and self.fill != "recompute":
                    self.kv[layer].append(self.skipped(layer, emitted.exit_layer, hidden, position))
                    continue
                before, hidden = hidden, self.layer(layer, hidden, position)
                done = layer + 1
                if emitted is not None or not drawn or (done < self.layers and not (may_exit and done in self.exits)):
                    continue
                threshold = None
                if done < self.layers:
                    threshold = rule.threshold(done, len(tokens) - len(prompt), params.max_tokens)
                    if threshold is None:
                        continue
                logits = self.logits(hidden, done)
                argmax = int(logits.argmax())
                last_argmax, run = argmax, run + 1 if argmax == last_argmax else 1
                where = (done, seed, sample, position)
                confidence = self.confidence(rule.criterion, logits, hidden, before, where, run / rule.patience)
                adjusted = self.adjust(logits, params, prompt, tokens)
                token = self.draw(adjusted, params, mix(seed, sample, position))
                if threshold is not None:
                    checks.append((done, confidence, threshold))
                    if confidence < threshold or int(adjusted.argmax()) != argmax:
                        continue
                emitted = RefToken(token, done, confidence, torch.log_softmax(logits, 0)[token].item(), checks)
            if emitted is not None:
                out.append(emitted)
                tokens.append(emitted.token)
                if self.ends(emitted.token, len(out), params):
                    break
        return out

    def skipped(self, layer: int, exit_layer: int, hidden: Tensor, position: int) -> tuple[Tensor, Tensor] | None:
        if self.fill == "project":
            return self.key_value(layer, hidden, position)
        return self.kv[exit_layer - 1][position] if self.fill == "alias" else None

    def ends(self, token: int, outputs: int, params: SamplingParams) -> bool:
        if outputs < params.min_tokens:
            return False
        return (token == self.config["eos_token_id"] and not params.ignore_eos) or token in (
            params.stop_token_ids or ()
        )

    def adjust(self, logits: Tensor, params: SamplingParams, prompt: list[int], tokens: list[int]) -> Tensor:
        logits = logits.clone()
        output = tokens[len(prompt) :]
        for token in set(tokens):
            value = logits[token]
            logits[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        for token in set(output):
            logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
        for token, bias in (params.logit_bias or {}).items():
            logits[token] += bias
        if len(output) < params.min_tokens:
            for token in (self.config["eos_token_id"], *(params.stop_token_ids or ())):
                logits[token] = -math.inf
        return logits

    def draw(self, logits: Tensor, params: SamplingParams, key: int) -> int:
        if params.temperature == 0:
            return int(logits.argmax())
        scaled = logits / params.temperature
        allowed = sorted(range(len(scaled)), key=lambda i: -scaled[i].item())
        p = torch.softmax(scaled, 0)
        allowed = [i for i in allowed if p[i] >= params.min_p * p.max()]
        if params.top_k > 0:
            allowed = allowed[: params.top_k]
        if params.top_p < 1:
            mass, kept, total = 0.0, [], p[allowed].sum().item()
            for i in allowed:
                if mass >= params.top_p:
                    break
                kept.append(i)
                mass += p[i].item() / total
            allowed = kept
        noise = gumbel(key, len(scaled), torch.device("cpu"))[0]
        return max(allowed, key=lambda i: (scaled[i] + noise[i]).item())
