"""`drex evaluate --set-within`: which early_exit.json it makes or changes, and which folders it never writes to."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from safetensors.torch import save_file
from test_model_folders import refused
from torch import ones
from typer.testing import CliRunner

import drex.llm
from drex.cli.main import app
from drex.compute.load import find_model
from drex.config import EarlyExit, resolve_exits
from drex.config.early_exit_json import EARLY_EXIT_FILE, EarlyExitFile, ExitSpec, read_early_exit, write_early_exit
from drex.llm import LLM
from drex.tuning.early_exit_file import measured_exits

LAYERS = 6
HEADS = "early_exit/heads.safetensors"


@pytest.fixture
def folder(text_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(text_model, tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat; the dog sat on the log. " * 40)
    return path


def evaluate(model: Path | str | None, text: Path, *options: str) -> None:
    """Run the command; what it raises is raised."""
    named = [] if model is None else [str(model)]
    words = ["evaluate", *named, "--text", str(text), "--tokens", "200", "--set-within", "1000", *options]
    done = CliRunner().invoke(app, words)
    if done.exception is not None:
        raise done.exception


def test_a_file_is_made_where_there_is_none(folder: Path, text: Path) -> None:
    evaluate(folder, text, "--exits", "2,4", "--sweep", "0.7,0.2", "--criterion", "margin", "--kv-fill", "alias")
    expected = EarlyExitFile((ExitSpec(2), ExitSpec(4)), "margin", (0.2, 0.2), "alias")
    assert read_early_exit(folder, LAYERS) == expected
    assert LLM(folder, dtype="float32").model.exits == resolve_exits(None, expected, LAYERS)
    assert [path.name for path in folder.glob("early_exit*")] == [EARLY_EXIT_FILE]


def test_one_setting_with_a_threshold_for_each_exit_is_written_as_it_is(folder: Path, text: Path) -> None:
    evaluate(folder, text, "--exits", "2,4", "--thresholds", "0.7,0.2")
    found = read_early_exit(folder, LAYERS)
    assert found is not None
    assert found.thresholds == (0.7, 0.2)


def test_heads_stay_and_what_was_measured_replaces_the_rest(folder: Path, text: Path) -> None:
    (folder / "early_exit").mkdir()
    save_file({"exits.4.norm.weight": ones(32)}, folder / HEADS)
    exits = (ExitSpec(2), ExitSpec(4, "norm", HEADS))
    write_early_exit(folder, EarlyExitFile(exits, "max_prob", (0.9, 0.8), "recompute", {"metric": "loss"}))
    evaluate(folder, text, "--thresholds", "0.3", "--criterion", "entropy", "--kv-fill", "project")
    assert read_early_exit(folder, LAYERS) == EarlyExitFile(exits, "entropy", (0.3, 0.3), "project", None)


def test_other_exits_than_those_of_the_file_are_refused_before_the_work(
    folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_early_exit(folder, EarlyExitFile((ExitSpec(2), ExitSpec(4)), thresholds=(0.9, 0.8)))
    before = (folder / EARLY_EXIT_FILE).read_bytes()
    monkeypatch.setattr(drex.llm, "LLM", None)
    with refused("exits after layers [2, 4]", "[4] are measured", "leave out --exits"):
        evaluate(folder, text, "--exits", "4")
    assert (folder / EARLY_EXIT_FILE).read_bytes() == before


def test_a_file_that_links_elsewhere_is_replaced_and_not_written_through(folder: Path, tmp_path: Path) -> None:
    shared = EarlyExitFile((ExitSpec(2),), thresholds=(0.9,))
    (tmp_path / "shared").mkdir()
    write_early_exit(tmp_path / "shared", shared)
    (folder / EARLY_EXIT_FILE).symlink_to(tmp_path / "shared" / EARLY_EXIT_FILE)
    own = EarlyExitFile((ExitSpec(2),), thresholds=(0.1,))
    write_early_exit(folder, own)
    assert read_early_exit(folder, LAYERS) == own
    assert read_early_exit(tmp_path / "shared", LAYERS) == shared


def in_hub_cache(folder: Path, tmp_path: Path) -> Path:
    return folder.rename(_made(tmp_path / "models--org--name" / "snapshots") / "abc")


def in_a_folder_that_leads_to_the_cache(folder: Path, tmp_path: Path) -> Path:
    link = tmp_path / "link"
    link.symlink_to(in_hub_cache(folder, tmp_path))
    return link


def in_another_hub_cache(folder: Path, tmp_path: Path) -> Path:
    return folder.rename(_made(tmp_path / "hub" / "x") / "abc")


def in_an_installed_package(folder: Path, tmp_path: Path) -> Path:
    return folder.rename(_made(tmp_path / "site-packages" / "models") / "abc")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (in_hub_cache, "hub's cache"),
        (in_a_folder_that_leads_to_the_cache, "hub's cache"),
        (in_another_hub_cache, "hub's cache"),
        (in_an_installed_package, "installed package"),
        (lambda folder, tmp_path: find_model(None), "installed package"),
    ],
    ids=["cache", "link to the cache", "cache by variable", "package", "bundled"],
)
def test_what_others_share_is_never_written_and_nothing_is_measured(  # type: ignore[no-untyped-def]
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place, words: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    placed = place(folder, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in placed.iterdir()}
    monkeypatch.setattr(drex.llm, "LLM", None)
    exits = () if (placed / EARLY_EXIT_FILE).is_file() else ("--exits", "2,4")
    with refused(words, "copy the folder"):
        evaluate(placed, text, *exits)
    assert {path.name: path.stat().st_mtime_ns for path in placed.iterdir()} == before


def test_the_bundled_model_without_a_name_is_never_written(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (find_model(None) / EARLY_EXIT_FILE).read_bytes()
    monkeypatch.setattr(drex.llm, "LLM", None)
    with refused("installed package", "copy the folder"):
        evaluate(None, text)
    assert (find_model(None) / EARLY_EXIT_FILE).read_bytes() == before


def test_a_folder_that_may_not_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = resolve_exits(EarlyExit(layers=[2], thresholds=0.5), None, LAYERS)
    assert measured_exits(folder, LAYERS, plan).exits == plan.exits
    monkeypatch.setattr("os.access", lambda *_: False)
    with refused("can't be written to", "copy the folder"):
        measured_exits(folder, LAYERS, plan)
    folder.joinpath(EARLY_EXIT_FILE).mkdir()
    with refused("cannot write early_exit.json"):
        write_early_exit(folder, EarlyExitFile((ExitSpec(2),), thresholds=(0.5,)))
