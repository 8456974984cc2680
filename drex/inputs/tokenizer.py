"""A model's tokeniser, loaded without any code that its folder brings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from drex.compute.config_file import read_json
from drex.compute.load import find_model
from drex.text_files import MARKS, decode

log = logging.getLogger(__name__)
TEXT_SUFFIXES = (".json", ".jinja", ".txt")
HUB_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
FAST, PIECES, BYTE_LEVEL = "tokenizer.json", "tokenizer.model", ("vocab.json", "merges.txt")
BYTE_LEVEL_CLASSES: dict[str, type[PreTrainedTokenizerBase]] = {
    "GPT2Tokenizer": GPT2Tokenizer,
    "Qwen2Tokenizer": Qwen2Tokenizer,
}
PROTOBUF_FIELD = b"\x0a"
"""How a file of SentencePiece begins; one of tiktoken's is lines of text."""


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokeniser of a folder or hub id; None where there is none.

    Raises:
        ValueError: a tokeniser that can't be loaded, or that only code in its folder could make; with the remedy.
    """
    folder = find_model(name, HUB_FILES)
    if not any((folder / file).is_file() for file in (FAST, PIECES)) and not _has_byte_level(folder):
        return None
    missing = _missing_libraries(folder)
    if missing:
        raise ValueError(f"{folder}: {PIECES} is read with libraries that are not here: pip install {missing}")
    own_code = _names_code(folder)
    try:
        with _without_marks(folder) as plain:
            tokenizer = _load(plain)
    except Exception as error:  # transformers and the libraries under it raise anything at all
        if own_code:
            raise ValueError(
                f"{folder}: its tokeniser is code in the folder (auto_map), which drex never runs: save it as "
                f"{FAST} and name the class that reads it, or name another with tokenizer (--tokenizer)"
            ) from error
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: the tokeniser can't be loaded ({said}); {_remedy(folder)}") from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise ValueError(f"{folder}: the tokeniser has no vocabulary; {_remedy(folder)}")
    if own_code:
        log.warning(
            "%s: the tokeniser names code in the folder (auto_map), which drex never runs: %s of transformers is used",
            folder,
            type(tokenizer).__name__,
        )
    return tokenizer


def _has_byte_level(folder: Path) -> bool:
    """Whether the folder has a vocabulary with merges; raises ValueError for merges without a vocabulary."""
    there = [(folder / file).is_file() for file in BYTE_LEVEL]
    if there == [False, True]:
        raise ValueError(f"{folder}: the tokeniser has merges.txt and no vocab.json: fetch the model again")
    return all(there)


def _names_code(folder: Path) -> bool:
    """Whether a configuration in the folder names a tokeniser of its own code."""
    for file in ("tokenizer_config.json", "config.json"):
        named = read_json(folder / file).get("auto_map") if (folder / file).is_file() else None
        if named and (not isinstance(named, dict) or "AutoTokenizer" in named or file != "config.json"):
            return True
    return False


@contextmanager
def _without_marks(folder: Path) -> Iterator[Path]:
    """The folder, or where text in it has a byte-order mark, which transformers takes for text, a copy without it."""
    texts = [path for path in folder.iterdir() if path.suffix in TEXT_SUFFIXES and path.is_file()]
    if not any(_has_mark(path) for path in texts):
        yield folder
        return
    with TemporaryDirectory(prefix="drex-tokenizer-") as copy:
        for path in texts:
            (Path(copy) / path.name).write_text(decode(path.read_bytes()), encoding="utf-8", newline="")
        if (folder / PIECES).is_file():
            (Path(copy) / PIECES).write_bytes((folder / PIECES).read_bytes())
        yield Path(copy)


def _has_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(3).startswith(MARKS)


def _load(folder: Path) -> PreTrainedTokenizerBase:
    """The tokeniser as transformers chooses its class, or of the class that a byte-level vocabulary names."""
    try:
        made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception:
        # Beside the models of some families transformers does not try the class that is named.
        file = folder / "tokenizer_config.json"
        named = str(read_json(file).get("tokenizer_class")) if file.is_file() else ""
        if not _has_byte_level(folder) or named.removesuffix("Fast") not in BYTE_LEVEL_CLASSES:
            raise
        made = BYTE_LEVEL_CLASSES[named.removesuffix("Fast")].from_pretrained(str(folder))
    return made


def _missing_libraries(folder: Path) -> str:
    """Names of the distributions that the folder's tokeniser takes and that are not installed, for pip."""
    if (folder / FAST).is_file() or not (folder / PIECES).is_file():
        return ""
    with (folder / PIECES).open("rb") as file:
        pieces = file.read(1) == PROTOBUF_FIELD
    return " ".join(
        name for name in (("sentencepiece", "protobuf") if pieces else ("tiktoken",)) if not _installed(name)
    )


def _remedy(folder: Path) -> str:
    """What makes a tokeniser that can't be loaded one that can."""
    if any((folder / file).is_file() for file in (FAST, PIECES)):
        return "fetch the model again"
    return "name its tokenizer_class in tokenizer_config.json, such as GPT2Tokenizer or Qwen2Tokenizer"


def _installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False
