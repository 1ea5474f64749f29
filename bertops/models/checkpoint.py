"""Reads Hugging Face checkpoint folders: config.json, safetensors, and the names inside them."""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bertops.models.config import BertConfig

# Ours -> the checkpoint's, without the model's prefix; several are concatenated along the rows. * is a layer.
BERT_NAMES = {
    "embeddings.word": ("embeddings.word_embeddings",),
    "embeddings.position": ("embeddings.position_embeddings",),
    "embeddings.token_type": ("embeddings.token_type_embeddings",),
    "embeddings.norm": ("embeddings.LayerNorm",),
    "layers.*.attention.qkv": (
        "encoder.layer.*.attention.self.query",
        "encoder.layer.*.attention.self.key",
        "encoder.layer.*.attention.self.value",
    ),
    "layers.*.attention.proj": ("encoder.layer.*.attention.output.dense",),
    "layers.*.attention_norm": ("encoder.layer.*.attention.output.LayerNorm",),
    "layers.*.up": ("encoder.layer.*.intermediate.dense",),
    "layers.*.down": ("encoder.layer.*.output.dense",),
    "layers.*.output_norm": ("encoder.layer.*.output.LayerNorm",),
    "pooler": ("pooler.dense",),
    "dense": ("pooler.dense",),
    "classifier": ("classifier",),
    "head.dense": ("cls.predictions.transform.dense",),
    "head.norm": ("cls.predictions.transform.LayerNorm",),
    "head": ("cls.predictions",),
}

ROBERTA_NAMES = BERT_NAMES | {
    "dense": ("classifier.dense",),
    "classifier": ("classifier.out_proj",),
    "head.dense": ("lm_head.dense",),
    "head.norm": ("lm_head.layer_norm",),
    "head": ("lm_head",),
}

DISTILBERT_NAMES = {
    "embeddings.word": ("embeddings.word_embeddings",),
    "embeddings.position": ("embeddings.position_embeddings",),
    "embeddings.norm": ("embeddings.LayerNorm",),
    "layers.*.attention.qkv": (
        "transformer.layer.*.attention.q_lin",
        "transformer.layer.*.attention.k_lin",
        "transformer.layer.*.attention.v_lin",
    ),
    "layers.*.attention.proj": ("transformer.layer.*.attention.out_lin",),
    "layers.*.attention_norm": ("transformer.layer.*.sa_layer_norm",),
    "layers.*.up": ("transformer.layer.*.ffn.lin1",),
    "layers.*.down": ("transformer.layer.*.ffn.lin2",),
    "layers.*.output_norm": ("transformer.layer.*.output_layer_norm",),
    "dense": ("pre_classifier",),
    "classifier": ("classifier",),
    "head.dense": ("vocab_transform",),
    "head.norm": ("vocab_layer_norm",),
    "head": ("vocab_projector",),
}

NAMES = {"bert": BERT_NAMES, "roberta": ROBERTA_NAMES, "distilbert": DISTILBERT_NAMES}

# Index buffers of old checkpoints, and heads that the model at hand does not have.
IGNORED = re.compile(
    r"embeddings\.(position|token_type)_ids$"
    r"|(pooler|cls|lm_head|classifier|pre_classifier|vocab_transform|vocab_layer_norm|vocab_projector|qa_outputs)\."
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The config and the tensors of a checkpoint folder; a tensor is read when it is asked for.

    Args:
        folder_or_hub_id: a folder with ``config.json`` and ``model.safetensors`` (or its sharded index), or
            the id of a model on the Hugging Face hub, whose files ``huggingface_hub`` then fetches or finds
            in its cache.

    Raises:
        FileNotFoundError: no such folder, or a file is missing from it.
        ImportError: a hub id without ``huggingface_hub``, or no ``safetensors``; says what to install.
        ValueError: ``config.json`` describes a model that this package does not have.
    """

    def __init__(self, folder_or_hub_id: str | Path) -> None:
        self.folder = resolve_folder(folder_or_hub_id)
        self.config = BertConfig.from_hf(_read_json(self.folder / "config.json"))
        self._sources: dict[str, tuple[Any, str]] = {}  # name without prefix -> (open file, stored name)
        self._files = ExitStack()
        for path in weight_files(self.folder):
            file = self._files.enter_context(_safe_open()(path, framework="pt"))
            for stored in file.keys():  # noqa: SIM118  (not a dict)
                name = plain_name(stored, self.config.family)
                if name in self._sources:
                    raise ValueError(f"{self.folder} holds {name} twice, the second time as {stored}")
                self._sources[name] = (file, stored)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def names(self) -> set[str]:
        return set(self._sources)

    def read(self, names: list[str], dtype: torch.dtype) -> Tensor:
        """The tensors of ``names`` laid one after the other along the rows, in memory of their own."""
        tensors = [file.get_tensor(stored).to(dtype) for file, stored in (self._sources[n] for n in names)]
        return torch.cat(tensors)


def resolve_folder(folder_or_hub_id: str | Path) -> Path:
    """The folder itself, or the local copy of the hub's files."""
    folder = Path(folder_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(folder_or_hub_id, Path) or not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", folder_or_hub_id):
        raise FileNotFoundError(f"no folder {folder_or_hub_id}, and it is not the id of a model on the hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"no folder {folder_or_hub_id}; to fetch that id from the hub: pip install bertops[hf]"
        ) from error
    return Path(snapshot_download(folder_or_hub_id, allow_patterns=["config.json", WEIGHTS, INDEX, "*-of-*"]))


def weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    return [folder / name for name in sorted(set(_read_json(folder / INDEX)["weight_map"].values()))]


def plain_name(stored: str, family: str) -> str:
    """Without the prefix that a model with a head gives its encoder; LayerNorm's old names replaced."""
    name = stored.removeprefix(f"{family}.")
    return re.sub(r"LayerNorm\.(gamma|beta)$", _modern_norm, name)


def source_names(name: str, family: str) -> list[str]:
    """The checkpoint's names for the parameter ``name`` of one of our models."""
    module, _, leaf = name.removeprefix("encoder.").rpartition(".")
    layer = re.match(r"layers\.(\d+)\.", module)
    pattern = re.sub(r"^layers\.\d+\.", "layers.*.", module)
    index = layer[1] if layer else ""
    return [f"{source.replace('*', index)}.{leaf}" for source in NAMES[family][pattern]]


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    is_new: Callable[[str], bool] = lambda name: False,
) -> None:
    """Fills ``model``, built on the meta device, from ``checkpoint``.

    Parameters for which ``is_new(name)`` holds stay on the meta device; the caller initialises them.

    Raises:
        ValueError: tensors are missing, left over or of another shape; names them all.
    """
    family = checkpoint.config.family
    state, problems, used = {}, [], set()
    for name, parameter in model.state_dict().items():
        if is_new(name):
            continue
        sources = source_names(name, family)
        used.update(sources)
        missing = [source for source in sources if source not in checkpoint]
        if missing:
            problems += [f"missing {source}" for source in missing]
            continue
        state[name] = checkpoint.read(sources, dtype)
        came, expected = tuple(state[name].shape), tuple(parameter.shape)
        if came != expected:
            problems.append(f"{' + '.join(sources)} of shape {came}, expected {expected}")
    unexpected = {name for name in checkpoint.names() - used if not IGNORED.match(name)}
    problems += [f"unexpected {name}" for name in sorted(unexpected)]
    if problems:
        raise ValueError(
            f"{checkpoint.folder} does not fit {type(model).__name__} ({family}): " + "; ".join(problems)
        )
    model.load_state_dict(state, strict=False, assign=True)


def _modern_norm(match: re.Match) -> str:
    return "LayerNorm." + {"gamma": "weight", "beta": "bias"}[match[1]]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    return json.loads(path.read_text(encoding="utf-8"))


def _safe_open() -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError("reading a checkpoint needs safetensors: pip install bertops[hf]") from error
    return safe_open
