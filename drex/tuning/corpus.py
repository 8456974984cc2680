"""Text for training: documents, a tokeniser, and packed blocks of token ids.

Owns the split into training and held-out documents (by a hash of the document's name, so that it never depends on
order or on which other documents there are) and the order in which blocks are visited (a permutation per epoch).
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from drex.progress import Progress
from drex.text_files import read_lines, read_text

END_OF_TEXT = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".jsonl.xz")
DOCUMENTS_AT_ONCE = 64
"""Of those that are tokenised, before it is said how many were."""
TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Document:
    """One text with a name that is the same on every machine."""

    name: str
    text: str


def standard_library() -> list[Document]:
    """The Python sources of this interpreter's standard library (PSF licence), its tests included."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return list(_read_folder(root, suffixes=(".py",), skip=("site-packages", "dist-packages", "__pycache__")))


def read_documents(sources: Iterable[str | Path]) -> list[Document]:
    """Read files and folders (searched recursively) as documents.

    Args:
        sources: paths to `.txt`, `.md`, `.rst`, `.py` (one document a file), `.jsonl` or `.jsonl.xz`
            (one document a line, field `text`, optional `id`), or folders of these.

    Raises:
        ValueError: a source that is missing, of another kind, or without any text.
    """
    documents: list[Document] = []
    for source in map(Path, sources):
        if source.is_dir():
            documents.extend(_read_folder(source, TEXT_SUFFIXES, skip=("__pycache__",)))
        elif source.is_file():
            documents.extend(_read_file(source, source.name))
        else:
            raise ValueError(f"no text at {source}: name a file or a folder of {', '.join(TEXT_SUFFIXES)} files")
    if not documents:
        raise ValueError(f"no documents found: the sources hold no {', '.join(TEXT_SUFFIXES)} file with text in it")
    return documents


def _read_folder(root: Path, suffixes: tuple[str, ...], skip: tuple[str, ...]) -> Iterator[Document]:
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.is_file() and path.name.endswith(suffixes) and not set(skip) & set(relative.parts):
            yield from _read_file(path, relative.as_posix())


def _read_file(path: Path, name: str) -> Iterator[Document]:
    if name.endswith((".jsonl", ".jsonl.xz")):
        try:
            lines = read_lines(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} can't be read as UTF-8 text ({error}): convert it, or leave it out") from error
        for number, line in lines:
            try:
                record = json.loads(line)
                name_of, text = f"{name}#{record.get('id', number)}", record["text"]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f'{path}, line {number}: expected an object with a "text" field') from error
            if not isinstance(text, str):
                raise ValueError(f'{path}, line {number}: "text" must be text')
            yield Document(name_of, text)
        return
    try:
        text = read_text(path)
    except UnicodeDecodeError:
        return  # a few test files of the standard library are in other encodings on purpose
    if text.strip():
        yield Document(name, text)


def split_held_out(documents: Iterable[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Split into (training, held-out) documents; `share` in [0, 1) of the names are held out."""
    training: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        bucket = int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:4], "big") / 2**32
        (held_out if bucket < share else training).append(document)
    return training, held_out


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokeniser over `documents`; every byte string has an encoding, so nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenize(documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """All documents as one stream of ids, each closed by the end-of-text token. Shape (tokens,)."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ValueError("the tokeniser has no end-of-text token: set eos_token in its tokenizer_config.json")
    pieces: list[TokenIds] = []
    with Progress("tokenising", sum(len(document.text) for document in documents)) as progress:
        for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
            texts = [document.text for document in documents[start : start + DOCUMENTS_AT_ONCE]]
            for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                pieces.append(np.asarray([*ids, eos], dtype=np.int32))
            progress.advance(sum(map(len, texts)))
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class Blocks:
    """A stream of ids cut into blocks of `length` inputs; a block's targets are its inputs moved by one."""

    ids: TokenIds
    length: int

    def __len__(self) -> int:
        return max(0, (len(self.ids) - 1) // self.length)

    def batch(self, numbers: Iterable[int]) -> TokenIds:
        """Blocks by number, one token longer than `length` each. Shape (blocks, length + 1)."""
        return np.stack([self.ids[n * self.length : n * self.length + self.length + 1] for n in numbers])

    def order(self, seed: int) -> Iterator[int]:
        """Block numbers without end: a fresh permutation each epoch, a pure function of `seed`."""
        epoch = 0
        while True:
            yield from np.random.default_rng([seed, epoch]).permutation(len(self)).tolist()
            epoch += 1
