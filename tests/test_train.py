"""`drex train` as a library function: it learns, resumes exactly, and writes what transformers and drex load."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from drex import LLM, EarlyExit
from drex.tuning import train as training
from drex.tuning.corpus import Blocks, Document, read_documents, split_held_out, tokenize, train_tokenizer
from drex.tuning.evaluate import evaluate, held_out_blocks, set_threshold
from drex.tuning.losses import exit_loss_weights
from drex.tuning.optim import Muon, orthogonalize
from drex.tuning.recipe import TrainConfig
from drex.tuning.train import train

QUIET = Console(file=io.StringIO())


def corpus() -> list[Document]:
    words = [
        "def",
        "return",
        "self",
        "value",
        "import",
        "class",
        "list",
        "print",
        "for",
        "in",
        "if",
        "else",
        "not",
        "name",
        "index",
        "text",
    ]
    draw = random.Random(0)
    return [Document(f"d{i}", " ".join(draw.choice(words) for _ in range(400))) for i in range(60)]


def config(**changes: object) -> TrainConfig:
    sizes = {
        "exits": (1, 2),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 3,
        "num_heads": 2,
        "num_kv_heads": 1,
        "sequence_length": 32,
        "tokens": 12 * 256,
        "batch_tokens": 256,
        "micro_batch_tokens": 64,
        "held_out_share": 0.2,
        "held_out_tokens": 1024,
    }
    return TrainConfig(**{**sizes, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, training.TrainReport]:
    out = tmp_path_factory.mktemp("trained") / "model"
    documents = corpus()
    tokenizer = train_tokenizer(split_held_out(documents, 0.2)[0], 300)
    return out, train(documents, tokenizer, out, config(), console=QUIET)


def test_loss_falls_and_is_reported_for_every_exit(trained: tuple[Path, training.TrainReport]) -> None:
    out, report = trained
    log = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 12
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert set(report.held_out_loss) == {"exit_1", "exit_2", "final"}
    assert report.tokens == 12 * 256


def test_the_folder_loads_in_transformers_and_scores_alike_in_drex(trained: tuple[Path, training.TrainReport]) -> None:
    out, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("def value in list return self")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    wanted = logits.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    llm = LLM(out, dtype="float32")
    assert llm.model.exits.layers == (1, 2)
    assert llm.score(ids)[0].logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, trained: tuple[Path, training.TrainReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = corpus()
    tokenizer = train_tokenizer(split_held_out(documents, 0.2)[0], 300)
    step = training._Run._train_step

    def interrupted(run: training._Run, numbers: object) -> dict[str, float]:
        if run.step == 5:
            raise KeyboardInterrupt
        return step(run, numbers)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training._Run, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(documents, tokenizer, tmp_path / "model", config(), console=QUIET)
    monkeypatch.setattr(training._Run, "_train_step", step)
    train(documents, tokenizer, tmp_path / "model", config(), resume=True, console=QUIET)
    resumed, whole = load_file(tmp_path / "model/model.safetensors"), load_file(trained[0] / "model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match="another muon_lr"):
        train(documents, tokenizer, tmp_path / "model", config(muon_lr=0.1), resume=True, console=QUIET)


def test_thresholds_are_measured_and_written(trained: tuple[Path, training.TrainReport]) -> None:
    out, _ = trained
    llm = LLM(out, early_exit=EarlyExit(thresholds=0.5), dtype="float32")
    blocks = held_out_blocks(llm, corpus(), 500)
    full, all_exit, none_exit = evaluate(llm, blocks, [0.0, 1.0])
    assert (full.exit_share, full.loss_ratio, full.agreement) == (0.0, 1.0, 1.0)
    assert all_exit.exits == {1: 1.0}
    assert none_exit.loss == pytest.approx(full.loss, abs=1e-6)
    assert set_threshold(out, 3, [full, all_exit, none_exit], 10.0, llm.model.exits).threshold == 0.0
    assert LLM(out, dtype="float32").model.exits.rule.thresholds == (0.0, 0.0)
    with pytest.raises(ValueError, match="measure higher thresholds"):
        set_threshold(out, 3, [full], 0.1, llm.model.exits)


def test_exit_loss_weights_follow_their_papers() -> None:
    assert exit_loss_weights("ee_llm", (4, 8), 12) == [0.1, 0.2, 1.0]
    assert exit_loss_weights("ee_llm", (4, 8), 12, (0.5, 0.6)) == [0.5, 0.6, 1.0]
    raw = [0.2 * 6, 0.2 * 28, 11 + 0.2 * 55]
    assert exit_loss_weights("layerskip", (4, 8), 12) == pytest.approx([value / sum(raw) for value in raw])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": (2, 1)}, "ascending"),
        ({"exits": (3,)}, "exits end before"),
        ({"batch_tokens": 100}, "multiple"),
        ({"tokens": 10}, "at least one batch"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_bad_places_and_texts_are_refused(tmp_path: Path, trained: tuple[Path, training.TrainReport]) -> None:
    tokenizer = train_tokenizer(corpus(), 300)
    with pytest.raises(ValueError, match="is not empty"):
        train(corpus(), tokenizer, trained[0], config(), console=QUIET)
    with pytest.raises(ValueError, match="nothing to resume"):
        train(corpus(), tokenizer, tmp_path / "new", config(), resume=True, console=QUIET)
    with pytest.raises(ValueError, match="too little text"):
        train([Document("a", "x")], tokenizer, tmp_path / "new2", config(), console=QUIET)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write"):
        train(corpus(), tokenizer, tmp_path / "file" / "model", config(), console=QUIET)
    with pytest.raises(ValueError, match="no text at"):
        read_documents([tmp_path / "nowhere"])
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"no": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_documents([tmp_path / "bad.jsonl"])


def test_documents_blocks_and_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("alpha beta gamma delta " * 8)
    (tmp_path / "b.jsonl").write_text('{"id": "x", "text": "gamma"}\n')
    (tmp_path / "c.bin").write_text("ignored")
    documents = read_documents([tmp_path])
    assert [d.name for d in documents] == ["a.txt", "b.jsonl#x"]
    tokenizer = train_tokenizer(documents, 300)
    ids = tokenize(documents, tokenizer)
    assert ids.tolist().count(tokenizer.eos_token_id) == 2
    blocks = Blocks(ids, 3)
    order = blocks.order(seed=1)
    epochs = [[next(order) for _ in range(len(blocks))] for _ in range(2)]
    assert all(sorted(epoch) == list(range(len(blocks))) for epoch in epochs)
    assert blocks.batch([0, 1])[0, -1] == blocks.batch([0, 1])[1, 0]


def test_muon_steps_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), 5))
        assert values.min() > 0.5
        assert values.max() < 1.3
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    weight.grad = torch.randn(8, 8)
    Muon([weight], lr=0.1).step()
    assert torch.linalg.svdvals(weight.detach()).max() < 0.13
