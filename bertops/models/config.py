"""The shapes of the encoders: BERT, RoBERTa and DistilBERT; ALBERT; MobileBERT."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

from torch import Tensor
from torch.nn import functional as F

from bertops.models import hf_config

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
SHARES = ("none", "ffn", "attention", "all")
NORMALIZATIONS = ("no_norm", "layer_norm")

Config = TypeVar("Config", bound="EncoderConfig")


@dataclass(frozen=True)
class EncoderConfig:
    """What the configs of all encoders have: :class:`BertConfig` describes the fields."""

    model_types: ClassVar[tuple[str, ...]] = ()
    # What a model in evaluation mode does not depend on, and a Hugging Face file need not express.
    not_in_hf: ClassVar[tuple[str, ...]] = ("attention_output_dropout_p",)

    family: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    pad_token_id: int | None = 0
    position_offset: int = 0
    hidden_dropout_p: float = 0.1
    attention_dropout_p: float = 0.1
    attention_output_dropout_p: float = 0.1
    classifier_dropout_p: float = 0.1
    num_labels: int = 2
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pooler: bool = True

    def __post_init__(self) -> None:
        families = sorted({hf_config.FAMILIES[name] for name in self.model_types})
        if self.family not in families:
            raise ValueError(f"family must be one of {', '.join(families)}, got {self.family!r}")
        if self.position_offset and self.pad_token_id is None:
            raise ValueError("pad_token_id must be set where position_offset is: positions skip it")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}")

    @classmethod
    def from_hf(cls: type[Config], config: Mapping[str, Any]) -> Config:
        """The same encoder as a Hugging Face ``config.json`` describes.

        Args:
            config: the file's content; its ``model_type`` is one of ``cls.model_types``.

        Raises:
            ValueError: another model type, a size that is missing, or a feature that this encoder lacks
                (decoders, relative positions); names the key.
        """
        return cls(**hf_config.read_fields(config, cls.model_types))

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` of which transformers makes the same encoder.

        What transformers has no key for stands under the key ``bertops``, which :meth:`from_hf` reads.

        Raises:
            ValueError: transformers has no such encoder; names the field.
        """
        config = hf_config.write_fields(self._hf_fields())
        read, values = asdict(self.from_hf(config)), asdict(self)
        differ = {name: value for name, value in values.items() if value != read[name]}
        for name in ("pooler", "always_project"):  # the tensors tell
            differ.pop(name, None)
        for name, value in differ.items():
            if name not in self.not_in_hf:
                raise ValueError(
                    f"{name} must be {read[name]!r} in transformers' models of the family {self.family}, "
                    f"got {value!r}"
                )
        return {**config, hf_config.OURS: differ} if differ else config

    def _hf_fields(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """Sizes, rates and conventions of an encoder; the defaults are BERT-base's.

    Args:
        family: ``bert``, ``roberta`` or ``distilbert``: which heads and which checkpoint names.
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: as in BERT.
        hidden_act: ``gelu`` (erf), ``gelu_new`` or ``gelu_pytorch_tanh`` (both tanh), ``relu``, ``silu``.
        layer_norm_eps: added to the variance.
        max_position_embeddings: rows of the position table, RoBERTa's unused first ones included.
        type_vocab_size: rows of the token type table, 0 for none (DistilBERT).
        pad_token_id: id whose embedding gets no gradient; RoBERTa does not count it as a position.
        position_offset: position of the first token. 0: positions are columns. Above 0 (RoBERTa:
            ``pad_token_id + 1``): positions count the tokens other than ``pad_token_id``, which stand at
            ``position_offset - 1``.
        hidden_dropout_p: dropout of the embeddings and of the feed-forward output.
        attention_dropout_p: dropout of the attention probabilities.
        attention_output_dropout_p: dropout of the attention block's output (DistilBERT: 0).
        classifier_dropout_p: dropout inside the classification head.
        num_labels: outputs of the classification head.
        initializer_range: standard deviation of new weights.
        tie_word_embeddings: the masked language model's decoder is the word embedding.
        pooler: the bare encoder has a pooler (DistilBERT never has).

    Raises:
        ValueError: ``family`` or ``hidden_act`` is unknown, or ``position_offset`` lacks ``pad_token_id``.
    """

    model_types: ClassVar[tuple[str, ...]] = (
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "distilbert",
    )


@dataclass(frozen=True)
class AlbertConfig(EncoderConfig):
    """Sizes, rates and sharing of an ALBERT; the defaults are those of ALBERT-base v2.

    Args:
        vocab_size, ...: as in :class:`BertConfig`; ``num_attention_heads`` of a released xlarge is 16.
        embedding_size: width E of the tables. A projection takes it to ``hidden_size`` where they differ.
        share: what the layers of a group have in common: ``all``; ``attention``, with its LayerNorm, each
            layer having a feed-forward of its own; ``ffn``, the reverse; or ``none``.
        num_hidden_groups: layer l of ``num_hidden_layers`` L belongs to group ⌊l / L · num_hidden_groups⌋.
        inner_group_num: layers of a group, all of which run whenever the group's turn comes: the encoder has
            ``num_hidden_layers * inner_group_num`` of them, and layers that share stand at the same place.
        always_project: project also where the widths are equal, as transformers' ALBERT does.

    Raises:
        ValueError: as :class:`BertConfig`; ``share`` is unknown, or the groups do not fit the layers.

    Source: Lan et al. 2020 (ALBERT), section 3.1; its code has groups, its table 4 the other sharings.
    """

    model_types: ClassVar[tuple[str, ...]] = ("albert",)
    not_in_hf: ClassVar[tuple[str, ...]] = (
        *EncoderConfig.not_in_hf,
        "share",
        "num_hidden_layers",
        "num_hidden_groups",
        "inner_group_num",
    )

    family: str = field(default="albert", init=False)
    vocab_size: int = 30000
    hidden_act: str = "gelu_new"
    hidden_dropout_p: float = 0.0
    attention_dropout_p: float = 0.0
    attention_output_dropout_p: float = 0.0
    embedding_size: int = 128
    share: str = "all"
    num_hidden_groups: int = 1
    inner_group_num: int = 1
    always_project: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share not in SHARES:
            raise ValueError(f"share must be one of {', '.join(SHARES)}, got {self.share!r}")
        if not 1 <= self.num_hidden_groups <= self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_groups must be from 1 to num_hidden_layers = {self.num_hidden_layers}, "
                f"got {self.num_hidden_groups}"
            )
        if self.inner_group_num < 1:
            raise ValueError(f"inner_group_num must be at least 1, got {self.inner_group_num}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "AlbertConfig":
        values = hf_config.read_fields(config, cls.model_types)
        del values["family"]
        return cls(**values)

    @property
    def projects(self) -> bool:
        return self.always_project or self.embedding_size != self.hidden_size

    def places(self) -> list[tuple[int, int]]:
        """(group, place in the group) of every layer, in the order in which they run."""
        per_group = self.num_hidden_layers / self.num_hidden_groups
        inner = range(self.inner_group_num)
        return [(int(i / per_group), j) for i in range(self.num_hidden_layers) for j in inner]

    def hf_places(self) -> list[tuple[int, int]]:
        """Where transformers has the layers: it shares whole ones only, else each is a group of its own."""
        places = self.places()
        return places if self.share == "all" else [(i, 0) for i in range(len(places))]

    def _hf_fields(self) -> dict[str, Any]:
        if self.share == "all":
            return asdict(self)
        count = len(self.places())
        return asdict(replace(self, num_hidden_layers=count, num_hidden_groups=count, inner_group_num=1))


@dataclass(frozen=True)
class MobileBertConfig(EncoderConfig):
    """Sizes of a MobileBERT; the defaults are those of the released model.

    Args:
        vocab_size, ...: as in :class:`BertConfig`. ``intermediate_size`` is that of each feed-forward
            network; the heads split ``intra_bottleneck_size``. ``pooler``: as in BERT; without it, the heads
            over the first token take that as it is (transformers: ``classifier_activation``).
        embedding_size: width E of the word table; three words next to each other are projected to
            ``hidden_size``, the width of the other tables and between the layers.
        intra_bottleneck_size: width inside a layer, below ``hidden_size`` in MobileBERT, above it in its
            teacher, whose bottlenecks are inverted.
        use_bottleneck_attention: queries, keys and values all come from the layer's bottleneck (TINY).
        key_query_shared_bottleneck: queries and keys come from a second bottleneck, values from the layer's
            input. With neither, all three come from the layer's input (the teacher).
        num_feedforward_networks: of a layer, one after the other.
        normalization_type: ``no_norm``, a scale and a bias alone, or ``layer_norm``.

    Raises:
        ValueError: as :class:`BertConfig`; ``normalization_type`` is unknown, the sizes do not fit each
            other, both bottlenecks of the attention are asked for, or there is a dropout or an offset that
            MobileBERT lacks.

    Source: Sun et al. 2020 (MobileBERT), table 1, and the configurations of its code.
    """

    model_types: ClassVar[tuple[str, ...]] = ("mobilebert",)

    family: str = "mobilebert"
    hidden_size: int = 512
    num_hidden_layers: int = 24
    num_attention_heads: int = 4
    intermediate_size: int = 512
    hidden_act: str = "relu"
    hidden_dropout_p: float = 0.0
    attention_output_dropout_p: float = 0.0
    classifier_dropout_p: float = 0.0
    pooler: bool = False
    embedding_size: int = 128
    intra_bottleneck_size: int = 128
    use_bottleneck_attention: bool = False
    key_query_shared_bottleneck: bool = True
    num_feedforward_networks: int = 4
    normalization_type: str = "no_norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalization_type not in NORMALIZATIONS:
            raise ValueError(
                f"normalization_type must be one of {', '.join(NORMALIZATIONS)}, "
                f"got {self.normalization_type!r}"
            )
        if self.use_bottleneck_attention and self.key_query_shared_bottleneck:
            raise ValueError(
                "key_query_shared_bottleneck must be False where use_bottleneck_attention is True: queries "
                "and keys come from one bottleneck"
            )
        if self.intra_bottleneck_size % self.num_attention_heads:
            raise ValueError(
                f"intra_bottleneck_size {self.intra_bottleneck_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.embedding_size > self.hidden_size:
            raise ValueError(
                f"embedding_size must be at most hidden_size = {self.hidden_size}, got {self.embedding_size}"
            )
        if self.num_feedforward_networks < 1:
            raise ValueError(
                f"num_feedforward_networks must be at least 1, got {self.num_feedforward_networks}"
            )
        for name in ("attention_output_dropout_p", "position_offset"):
            if getattr(self, name):
                raise ValueError(f"{name} must be 0: MobileBERT has none, got {getattr(self, name)}")


def config_from_hf(config: Mapping[str, Any]) -> EncoderConfig:
    """The config, of the class that fits, of a Hugging Face ``config.json``.

    Raises:
        ValueError: a model that this package does not have; names the key.
    """
    config_classes: tuple[type[EncoderConfig], ...] = (BertConfig, AlbertConfig, MobileBertConfig)
    for config_class in config_classes:
        if config.get("model_type") in config_class.model_types:
            return config_class.from_hf(config)
    known = ", ".join(hf_config.FAMILIES)
    raise ValueError(f"model_type must be one of {known}, got {config.get('model_type')!r}")
