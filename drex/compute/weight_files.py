"""The safetensors files of a checkpoint: which tensor is where, and whether they are weights that drex can run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from drex.compute.config_file import PLAIN_DTYPES, read_json

T = TypeVar("T")
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PLAIN = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that stand for themselves, as safetensors names them."""
RUN = re.compile(r"(_proj|lm_head|embed_tokens|norm|head|probe)\.(weight|bias)$")
"""Names of tensors that are run as they are."""
BESIDE = re.compile(r"(_proj|lm_head|embed_tokens)\.(?!(weight|bias)$)")
"""Names of tensors that belong to a product, and are neither its weight nor its bias."""
FORMS = (
    (r"adapter_model\..*", "are an adapter's: merge it into its base model (PEFT's merge_and_unload) and save that"),
    (r"consolidated.*", "are in the format of the model's authors: take the checkpoint's Hugging Face version"),
    (r".*\.gguf", "are GGUF, which llama.cpp runs: take the checkpoint that it was made of"),
    (r".*\.(bin|pt|pth)", "are pickled, which can run code: convert them, as with save_pretrained of transformers"),
    (r".*\.(h5|msgpack|onnx)", "are of another framework: take or make the checkpoint's safetensors version"),
    (r".*\.safetensors", f"are under another name: call the file {WEIGHTS}, or bring {INDEX} with several"),
)
"""Weights in forms that drex does not read, by the names of their files, and what to do about it."""


class TensorFiles:
    """The safetensors files of a folder, by tensor name.

    Args:
        folder: of the checkpoint.
        names: of the files; None is those of the model itself.

    Raises:
        ValueError: no safetensors weights, a file that is missing or corrupt, or weights that are quantised.
    """

    def __init__(self, folder: Path, names: Sequence[str] | None = None) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._unread: set[str] = set()
        for path in self._paths(folder) if names is None else [folder / name for name in names]:
            for key, dtype in _open(path, _dtypes).items():
                self._check(key, dtype)
                self._file_of[key] = path
        self._unread.update(self._file_of)

    @staticmethod
    def _paths(folder: Path) -> list[Path]:
        if (folder / INDEX).is_file():
            names = read_json(folder / INDEX).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise ValueError(f"{folder / INDEX} has no weight_map: fetch the model again")
            return [folder / name for name in sorted(set(map(str, names.values())))]
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        raise ValueError(f"{folder} has no {WEIGHTS}{_form(folder)}")

    def _check(self, name: str, dtype: str) -> None:
        """Raise ValueError for a tensor that says that weights are quantised, or lack what is to be added to them."""
        found = f"{self.folder}: the weights have {name}"
        if "lora_" in name or ".base_layer." in name:
            raise ValueError(f"{found}, of an adapter: merge it (PEFT's merge_and_unload), and save the model again")
        if BESIDE.search(name) or (RUN.search(name) and dtype not in PLAIN):
            remedy = f"use the checkpoint in {PLAIN_DTYPES}"
            raise ValueError(f"{found} ({dtype}), so they are quantised, which is not supported: {remedy}")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def unread(self) -> list[str]:
        """Names of the tensors that were never read, in order."""
        return sorted(self._unread)

    def numel(self) -> int:
        """Numbers that all tensors hold together, from the files' headers."""

        def count(file: safe_open) -> int:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118

        return sum(_open(path, count) for path in sorted(set(self._file_of.values())))

    def read(self, name: str, shape: Sequence[int], out: Tensor) -> None:
        """Copy one tensor into `out`, converting its dtype; raises ValueError if it is missing or of another shape."""
        if name not in self._file_of:
            raise ValueError(f"{self.folder}: the weights have no {name}; {self._why_missing(name)}")
        path = self._file_of[name]

        def copy(file: safe_open) -> None:
            tensor = file.get_tensor(name)
            if list(tensor.shape) != list(shape):
                raise ValueError(
                    f"{path}: {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}; "
                    "the files do not belong together"
                )
            out.copy_(tensor)

        _open(path, copy)
        self._unread.discard(name)

    def _why_missing(self, name: str) -> str:
        """What the names that are there say about one that is not."""
        inner = name.removeprefix("model.")
        longer = next((key for key in sorted(self._file_of) if key != name and key.endswith(f".{inner}")), None)
        if inner in self._file_of or longer is not None:
            return (
                f"they have {inner if inner in self._file_of else longer}, of a model that was saved inside or "
                "without another: save it again as transformers' ...ForCausalLM, with save_pretrained"
            )
        if name == "lm_head.weight":
            return (
                "a model without a head generates no text: take the checkpoint of its ...ForCausalLM, or set "
                "tie_word_embeddings in config.json to true if the embedding is the head"
            )
        return "the checkpoint is incomplete, fetch it again"


def _form(folder: Path) -> str:
    """The rest of a message that there is no model.safetensors: what there is instead, and the remedy."""
    names = sorted(path.name for path in folder.iterdir())
    for pattern, remedy in FORMS:
        found = next((name for name in names if re.fullmatch(pattern, name)), None)
        if found is not None:
            return f": the weights in {found} {remedy}"
    return ": fetch the model again, or convert the weights, as with save_pretrained of transformers"


def _dtypes(file: safe_open) -> dict[str, str]:
    return {key: str(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118


def _open(path: Path, use: Callable[[safe_open], T]) -> T:
    try:
        with safe_open(str(path), framework="pt") as file:
            return use(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or corrupt ({error}): fetch the model again") from error
