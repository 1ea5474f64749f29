"""Reads and writes Hugging Face checkpoint folders: config.json, safetensors, and the names inside them."""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bertops._files import write_whole
from bertops.models.config import AlbertConfig, EncoderConfig, config_from_hf

if TYPE_CHECKING:
    from bertops.models.encoder import Pretrained

# Ours -> the checkpoint's, without the model's prefix; several are concatenated along the rows. * is a
# layer, of which LAYERS gives the checkpoint's path, and behind it a number inside the layer.
BERT_NAMES = {
    "embeddings.word": ("embeddings.word_embeddings",),
    "embeddings.position": ("embeddings.position_embeddings",),
    "embeddings.token_type": ("embeddings.token_type_embeddings",),
    "embeddings.norm": ("embeddings.LayerNorm",),
    "layers.*.attention.qkv": (
        "*.attention.self.query",
        "*.attention.self.key",
        "*.attention.self.value",
    ),
    "layers.*.attention.proj": ("*.attention.output.dense",),
    "layers.*.attention_norm": ("*.attention.output.LayerNorm",),
    "layers.*.up": ("*.intermediate.dense",),
    "layers.*.down": ("*.output.dense",),
    "layers.*.output_norm": ("*.output.LayerNorm",),
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
        "*.attention.q_lin",
        "*.attention.k_lin",
        "*.attention.v_lin",
    ),
    "layers.*.attention.proj": ("*.attention.out_lin",),
    "layers.*.attention_norm": ("*.sa_layer_norm",),
    "layers.*.up": ("*.ffn.lin1",),
    "layers.*.down": ("*.ffn.lin2",),
    "layers.*.output_norm": ("*.output_layer_norm",),
    "dense": ("pre_classifier",),
    "classifier": ("classifier",),
    "head.dense": ("vocab_transform",),
    "head.norm": ("vocab_layer_norm",),
    "head": ("vocab_projector",),
}

ALBERT_NAMES = BERT_NAMES | {
    "embeddings.projection": ("encoder.embedding_hidden_mapping_in",),
    "layers.*.attention.qkv": ("*.attention.query", "*.attention.key", "*.attention.value"),
    "layers.*.attention.proj": ("*.attention.dense",),
    "layers.*.attention_norm": ("*.attention.LayerNorm",),
    "layers.*.up": ("*.ffn",),
    "layers.*.down": ("*.ffn_output",),
    "layers.*.output_norm": ("*.full_layer_layer_norm",),
    "pooler": ("pooler",),
    "dense": ("pooler",),
    "sentence_order": ("sop_classifier.classifier",),
    "head.dense": ("predictions.dense",),
    "head.norm": ("predictions.LayerNorm",),
    "head": ("predictions",),
}

MOBILEBERT_NAMES = BERT_NAMES | {
    "embeddings.projection": ("embeddings.embedding_transformation",),
    "layers.*.bottleneck.dense": ("*.bottleneck.input.dense",),
    "layers.*.bottleneck.norm": ("*.bottleneck.input.LayerNorm",),
    "layers.*.qk_bottleneck.dense": ("*.bottleneck.attention.dense",),
    "layers.*.qk_bottleneck.norm": ("*.bottleneck.attention.LayerNorm",),
    "layers.*.attention.qk": ("*.attention.self.query", "*.attention.self.key"),
    "layers.*.attention.value": ("*.attention.self.value",),
    "layers.*.ffn.*.up": ("*.ffn.*.intermediate.dense",),
    "layers.*.ffn.*.down": ("*.ffn.*.output.dense",),
    "layers.*.ffn.*.norm": ("*.ffn.*.output.LayerNorm",),
    "layers.*.last_ffn.up": ("*.intermediate.dense",),
    "layers.*.last_ffn.down": ("*.output.dense",),
    "layers.*.last_ffn.norm": ("*.output.LayerNorm",),
    "layers.*.output": ("*.output.bottleneck.dense",),
    "layers.*.output_norm": ("*.output.bottleneck.LayerNorm",),
    "next_sentence": ("cls.seq_relationship",),
    "extra": ("cls.predictions.dense",),
}

NAMES = {
    "bert": BERT_NAMES,
    "roberta": ROBERTA_NAMES,
    "distilbert": DISTILBERT_NAMES,
    "albert": ALBERT_NAMES,
    "mobilebert": MOBILEBERT_NAMES,
}
LAYERS = {
    "bert": "encoder.layer.{}",
    "roberta": "encoder.layer.{}",
    "distilbert": "transformer.layer.{}",
    "mobilebert": "encoder.layer.{}",
}
CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "albert": "Albert",
    "mobilebert": "MobileBert",
}

# Index buffers of old checkpoints, and heads that the model at hand does not have.
IGNORED = re.compile(
    r"embeddings\.(position|token_type)_ids$"
    r"|(pooler|cls|lm_head|classifier|pre_classifier|vocab_transform|vocab_layer_norm|vocab_projector|qa_outputs"
    r"|predictions|sop_classifier)\."
)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_FILES = [
    CONFIG,
    WEIGHTS,
    INDEX,
    "*-of-*",
    "exits.safetensors",
    "tokenizer*.json",
    "special_tokens_map.json",
]


class Checkpoint:
    """The config and the tensors of a checkpoint folder; a tensor is read when it is asked for.

    Args:
        folder_or_hub_id: a folder with ``config.json`` and ``model.safetensors`` (or its sharded index), or
            the id of a model on the Hugging Face hub, whose files ``huggingface_hub`` then fetches or finds
            in its cache.
        config_class: of the model that is to take it.

    Raises:
        FileNotFoundError: no such folder, or a file is missing from it.
        ImportError: a hub id without ``huggingface_hub``, or no ``safetensors``; says what to install.
        ValueError: ``config.json`` describes a model that this package does not have, or another than
            ``config_class``.
    """

    def __init__(self, folder_or_hub_id: str | Path, config_class: type[EncoderConfig]) -> None:
        self.folder = resolve_folder(folder_or_hub_id)
        self.config = config_from_hf(read_json(self.folder / CONFIG))
        if not isinstance(self.config, config_class):
            raise ValueError(
                f"{self.folder} must hold a model of one of the types {', '.join(config_class.model_types)}, "
                f"got {self.config.family}"
            )
        self._sources: dict[str, tuple[Any, str]] = {}  # name without prefix -> (open file, stored name)
        self._files = ExitStack()
        for path in weight_files(self.folder):
            file = self._files.enter_context(open_tensors(path))
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

    @property
    def has_pooler(self) -> bool:
        names = NAMES[self.config.family].get("pooler", ())
        return any(f"{name}.weight" in self for name in names)

    def replace(self, **changes: Any) -> Any:
        """The config with other values in some fields."""
        return replace(self.config, **changes)

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
    return Path(snapshot_download(folder_or_hub_id, allow_patterns=HUB_FILES))


def weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    return [folder / name for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]


def plain_name(stored: str, family: str) -> str:
    """Without the prefix that a model with a head gives its encoder; LayerNorm's old names replaced."""
    name = stored.removeprefix(f"{family}.")
    return re.sub(r"LayerNorm\.(gamma|beta)$", _modern_norm, name)


def source_names(name: str, config: EncoderConfig) -> list[str]:
    """The checkpoint's names for the parameter ``name`` of one of our models."""
    module, _, leaf = name.removeprefix("encoder.").rpartition(".")
    numbers = re.findall(r"\.(\d+)(?=\.)", module)
    pattern = re.sub(r"\.\d+(?=\.)", ".*", module)
    paths = [layer_path(int(numbers[0]), config), *numbers[1:]] if numbers else []
    sources = NAMES[config.family][pattern]
    return [f"{source.replace('*', '{}').format(*paths)}.{leaf}" for source in sources]


def layer_path(layer: int, config: EncoderConfig) -> str:
    """Where the checkpoint has the layer, counted from 0 as it runs."""
    if not isinstance(config, AlbertConfig):
        return LAYERS[config.family].format(layer)
    group, place = config.hf_places()[layer]
    return f"encoder.albert_layer_groups.{group}.albert_layers.{place}"


def load_weights(
    model: "Pretrained",
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
    state: dict[str, Tensor] = {}
    problems, used = [], set()
    first: dict[int, tuple[str, list[str]]] = {}  # parameter -> its name and the sources read for it
    for name, parameter in model.state_dict(keep_vars=True).items():
        if is_new(name):
            continue
        sources = source_names(name, model.config)
        used.update(sources)
        missing = [source for source in sources if source not in checkpoint]
        if missing:
            problems += [f"missing {source}" for source in missing]
            continue
        shared_name, shared_sources = first.setdefault(id(parameter), (name, sources))
        if shared_name != name:
            if sources != shared_sources and not torch.equal(
                checkpoint.read(sources, dtype), state[shared_name]
            ):
                problems.append(
                    f"{' + '.join(sources)} differs from {' + '.join(shared_sources)}, but is shared"
                )
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


def save_model(model: "Pretrained", folder: Path) -> None:
    """Writes the folder that :meth:`Pretrained.save_pretrained` promises."""
    config = model.config.to_hf() | {
        "architectures": [CLASSES[model.config.family] + model.hf_name],
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    write_folder(folder, hf_tensors(model), config)


def write_folder(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Writes ``tensors``, each in memory of its own on the CPU, then ``config``."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError("writing a checkpoint needs safetensors: pip install bertops[hf]") from error
    weights = save(tensors, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS, weights)
    write_whole(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def hf_tensors(model: "Pretrained") -> dict[str, Tensor]:
    """Every tensor under the name that transformers gives it, in memory of its own on the CPU."""
    config = model.config
    prefix = "" if model.hf_name == "Model" else f"{config.family}."
    tensors = {}
    for name, parameter in model.state_dict().items():
        sources = source_names(name, config)
        for source, tensor in zip(sources, parameter.chunk(len(sources)), strict=True):
            inside = name.startswith("encoder.") or source.startswith("pooler.")
            tensors[(prefix if inside else "") + source] = tensor.cpu().clone()
    if isinstance(config, AlbertConfig) and not config.projects:  # transformers always projects
        name = f"{prefix}encoder.embedding_hidden_mapping_in"
        eye = torch.eye(config.hidden_size, dtype=next(model.parameters()).dtype)
        tensors |= {f"{name}.weight": eye, f"{name}.bias": torch.zeros_like(eye[0])}
    return tensors


def _modern_norm(match: re.Match) -> str:
    return "LayerNorm." + {"gamma": "weight", "beta": "bias"}[match[1]]


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, under the names in the files."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with open_tensors(path) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    return tensors


def open_tensors(path: Path) -> Any:
    """The file, open, whose tensors are read when they are asked for.

    Raises:
        ValueError: it is damaged.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("reading a checkpoint needs safetensors: pip install bertops[hf]") from error
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
