"""`drex train` as a library function: it learns, resumes exactly, and writes what transformers and drex load."""

from __future__ import annotations

import io
import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from drex import LLM, EarlyExit
from drex.tuning import run as training
from drex.tuning.corpus import Blocks, Document, read_documents, split_held_out, tokenize, train_tokenizer
from drex.tuning.evaluate import evaluate, held_out_blocks, set_threshold
from drex.tuning.interruption import Stopped
from drex.tuning.losses import exit_loss_weights
from drex.tuning.optim import Muon, orthogonalize
from drex.tuning.recipe import TrainConfig
from drex.tuning.train import TrainReport, check_folder, train

QUIET = io.StringIO()


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
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainReport]:
    out = tmp_path_factory.mktemp("trained") / "model"
    documents = corpus()
    tokenizer = train_tokenizer(split_held_out(documents, 0.2)[0], 300)
    return out, train(documents, tokenizer, out, config(), file=QUIET)


def test_loss_falls_and_is_reported_for_every_exit(trained: tuple[Path, TrainReport]) -> None:
    out, report = trained
    log = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 12
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert set(report.held_out_loss) == {"exit_1", "exit_2", "final"}
    assert report.tokens == 12 * 256


def test_the_folder_loads_in_transformers_and_scores_alike_in_drex(trained: tuple[Path, TrainReport]) -> None:
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


def test_a_run_stopped_in_the_middle_of_a_step_is_saved_and_goes_on_as_if_nothing_had_been(
    tmp_path: Path, trained: tuple[Path, TrainReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = corpus()
    tokenizer = train_tokenizer(split_held_out(documents, 0.2)[0], 300)
    update = training.TrainingRun._update

    def interrupted(run: training.TrainingRun, micro_batches: int) -> None:
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        update(run, micro_batches)

    monkeypatch.setattr(training.TrainingRun, "_update", interrupted)
    with pytest.raises(Stopped, match="stopped after step 6 of 12, saved"):
        train(documents, tokenizer, tmp_path / "model", config(), file=QUIET)
    monkeypatch.setattr(training.TrainingRun, "_update", update)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(documents, tokenizer, tmp_path / "model", config(), resume=True, file=QUIET)
    resumed, whole = load_file(tmp_path / "model/model.safetensors"), load_file(trained[0] / "model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match="another muon_lr"):
        train(documents, tokenizer, tmp_path / "model", config(muon_lr=0.1), resume=True, file=QUIET)


def test_a_run_that_is_killed_in_a_step_goes_on_from_its_last_checkpoint(
    tmp_path: Path, trained: tuple[Path, TrainReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = corpus()
    tokenizer = train_tokenizer(split_held_out(documents, 0.2)[0], 300)
    step = training.TrainingRun._train_step

    def killed(run: training.TrainingRun, numbers: object) -> dict[str, float]:
        if run.step == 2:
            raise KeyboardInterrupt
        return step(run, numbers)  # type: ignore[arg-type]

    monkeypatch.setattr(training.TrainingRun, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(documents, tokenizer, tmp_path / "model", config(), file=QUIET)
    monkeypatch.setattr(training.TrainingRun, "_train_step", step)
    train(documents, tokenizer, tmp_path / "model", config(), resume=True, file=QUIET)
    resumed, whole = load_file(tmp_path / "model/model.safetensors"), load_file(trained[0] / "model.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert len((tmp_path / "model/training/log.jsonl").read_text().splitlines()) == 12


FOLDERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "empty": ("",),
    "begun": ("tokenizer.json", "tokenizer_config.json", "training/log.jsonl"),
    "killed while saving": ("tokenizer.json", "training/checkpoint.pt.part"),
    "saved": ("tokenizer.json", "training/log.jsonl", "training/checkpoint.pt"),
    "finished": ("config.json", "model.safetensors", "training/report.json"),
    "finished, with its checkpoint": ("config.json", "training/checkpoint.pt"),
    "somebody's": ("thesis.tex",),
    "somebody's training": ("training/data.csv",),
}
BEGINS = {"none", "empty", "begun", "killed while saving"}
GOES_ON = {"saved", "finished, with its checkpoint"}


@pytest.mark.parametrize("state", FOLDERS)
def test_a_refusal_never_names_a_way_that_is_refused_too(tmp_path: Path, state: str) -> None:
    out = tmp_path / "model"
    for name in FOLDERS[state]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch() if name else out.mkdir()
    before = sorted(tmp_path.rglob("*"))
    said = {}
    for resume in (False, True):
        try:
            check_folder(out, resume)
        except ValueError as error:
            said[resume] = str(error)
    assert (False not in said) == (state in BEGINS)
    assert (True not in said) == (state in GOES_ON)
    assert ("pass --resume" in said.get(False, "")) == (state in GOES_ON)
    assert ("leave out --resume" in said.get(True, "")) == (state in BEGINS)
    assert state in BEGINS | GOES_ON or all("new folder" in words for words in said.values())
    if state != "killed while saving":
        assert sorted(tmp_path.rglob("*")) == before


def test_a_beginning_without_a_checkpoint_is_begun_afresh(tmp_path: Path, trained: tuple[Path, TrainReport]) -> None:
    documents = corpus()
    tokenizer = train_tokenizer(split_held_out(documents, 0.2)[0], 300)
    out = tmp_path / "model"
    (out / "training").mkdir(parents=True)
    (out / "training" / "log.jsonl").write_text('{"step": 1}\n')
    train(documents, tokenizer, out, config(), file=QUIET)
    assert (out / "training/log.jsonl").read_text() == (trained[0] / "training/log.jsonl").read_text()


def test_a_broken_checkpoint_is_refused_with_a_remedy(tmp_path: Path, trained: tuple[Path, TrainReport]) -> None:
    documents = corpus()
    out = tmp_path / "model"
    train_tokenizer(split_held_out(documents, 0.2)[0], 300).save_pretrained(out)
    (out / "training").mkdir()
    whole = (trained[0] / "training/checkpoint.pt").read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        (out / "training/checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"can't be read .*: start again in a new folder"):
            train(documents, 300, out, config(), resume=True, file=QUIET)


def test_thresholds_are_measured_and_written(trained: tuple[Path, TrainReport]) -> None:
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
        ({"micro_batch_tokens": 0}, "micro_batch_tokens is 0: give at least 1"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": 3}, "a multiple of twice num_heads"),
        ({"num_kv_heads": 4}, "num_heads one of num_kv_heads"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"muon_lr": float("nan")}, "muon_lr is nan"),
        ({"exit_head": "big"}, "exit head 'big': choose one of"),
        ({"exit_loss": "all"}, "unknown exit loss"),
        ({"exit_weights": (0.1,)}, "one weight from 0 on for each of 2 exits"),
        ({"exit_weights": (0.1, float("nan"))}, "one weight from 0 on"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_bad_places_and_texts_are_refused(tmp_path: Path, trained: tuple[Path, TrainReport]) -> None:
    tokenizer = train_tokenizer(corpus(), 300)
    with pytest.raises(ValueError, match="is not empty"):
        train(corpus(), tokenizer, trained[0], config(), file=QUIET)
    with pytest.raises(ValueError, match="nothing to resume"):
        train(corpus(), tokenizer, tmp_path / "new", config(), resume=True, file=QUIET)
    with pytest.raises(ValueError, match="too little text"):
        train([Document("a", "x")], tokenizer, tmp_path / "new2" / "model", config(), file=QUIET)
    assert not (tmp_path / "new2").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write"):
        train(corpus(), tokenizer, tmp_path / "file" / "model", config(), file=QUIET)
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
