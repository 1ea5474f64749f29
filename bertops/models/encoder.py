"""What the encoders of all families share: layers, the forward, and loading and saving."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from bertops.models.checkpoint import Checkpoint, load_weights, save_model
from bertops.models.config import ACTIVATIONS, EncoderConfig
from bertops.models.rows import first_tokens, positions_of, run_unpadded
from bertops.nn import Attention, FactorizedEmbedding
from bertops.ops import _checks

if TYPE_CHECKING:
    from bertops.models.mobilebert import TrigramEmbeddings

TOKENS_AT_A_TIME = 512  # of a feed-forward without gradients on a CPU

Model = TypeVar("Model", bound="Encoder")


@dataclass
class EncoderOutput:
    """What an encoder returns. Rows of masked tokens hold nothing of meaning; with ``unpad`` they are 0."""

    last_hidden_state: Tensor  # (B, N, hidden_size), packed (1, T, hidden_size)
    pooler_output: Tensor | None = None  # (number of sequences, hidden_size)
    hidden_states: tuple[Tensor, ...] | None = None  # the embeddings, then every layer
    scores: tuple[Tensor, ...] | None = None  # of every layer (B, H, N, N), packed (1, H, T, T)


class Layer(nn.Module):
    """One post-LayerNorm block: attention, then feed-forward, each added to its input and normalised.

    Args:
        config: sizes and rates.
        attention_of, feed_forward_of: layers whose attention, and whose feed-forward, this one shares, each
            with the LayerNorm behind it.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        attention_of: "Layer | None" = None,
        feed_forward_of: "Layer | None" = None,
    ) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        if attention_of is None:
            self.attention = Attention(width, config.num_attention_heads, config.attention_dropout_p)
            self.attention_norm = nn.LayerNorm(width, eps=eps)
        else:
            self.attention, self.attention_norm = attention_of.attention, attention_of.attention_norm
        if feed_forward_of is None:
            self.up = nn.Linear(width, config.intermediate_size)
            self.down = nn.Linear(config.intermediate_size, width)
            self.output_norm = nn.LayerNorm(width, eps=eps)
        else:
            self.up, self.down = feed_forward_of.up, feed_forward_of.down
            self.output_norm = feed_forward_of.output_norm
        self.attention_dropout = nn.Dropout(config.attention_output_dropout_p)
        self.output_dropout = nn.Dropout(config.hidden_dropout_p)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(
        self, hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, return_scores: bool
    ) -> tuple[Tensor, Tensor | None]:
        attended = self.attention(hidden, mask, cu_seqlens=cu_seqlens, return_scores=return_scores)
        attended, scores = attended if return_scores else (attended, None)
        hidden = self.attention_norm(hidden + self.attention_dropout(attended))
        return self.output_norm(hidden + self.output_dropout(self.feed_forward(hidden))), scores

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """Without gradients a CPU takes some tokens at a time: their wide rows then stay in its cache."""
        width = hidden.shape[-1]
        eager_cpu = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
        if torch.is_grad_enabled() or not eager_cpu or hidden.numel() <= TOKENS_AT_A_TIME * width:
            return self.down(self.activation(self.up(hidden)))
        parts = hidden.reshape(-1, width).split(TOKENS_AT_A_TIME)
        return torch.cat([self.down(self.activation(self.up(part))) for part in parts]).view_as(hidden)


class Pretrained(nn.Module):
    """A model with a Hugging Face twin: what loading and saving need to know of it."""

    config: EncoderConfig
    config_class: ClassVar[type[EncoderConfig]]
    hf_name: ClassVar[str]  # of the twin's class, behind the family's name

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``, from which transformers makes the same model.

        Each file is the old one or the new one, never a part of it; the tensors come first. Of the RoBERTa
        family it is transformers' RoBERTa. Where transformers cannot share as an ALBERT does, every layer
        gets its copy, and reading checks that they are equal.

        Args:
            folder: made where it does not exist.

        Raises:
            ImportError: ``safetensors`` is missing.
            ValueError: transformers has no such model; names the field of the config. Nothing is written.
        """
        save_model(self, Path(folder))


class Encoder(Pretrained):
    """Embeddings, layers and perhaps a pooler; the families differ in how they build them.

    Args:
        config: sizes and conventions; ``config.pooler`` adds BERT's pooler, tanh of a linear layer over the
            first token.
        embeddings: what the first layer takes.
        layers: in the order in which they run; one that comes more than once is shared.
    """

    hf_name = "Model"

    def __init__(
        self,
        config: EncoderConfig,
        embeddings: "FactorizedEmbedding | TrigramEmbeddings",
        layers: Iterable[nn.Module],
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = embeddings
        self.layers = nn.ModuleList(layers)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if config.pooler else None
        initialize(self, config)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder_or_hub_id: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> Model:
        """The encoder of a Hugging Face checkpoint, with or without a head, in evaluation mode.

        A head's tensors are left out, and a checkpoint without a pooler gives a model without one.

        Args:
            folder_or_hub_id: a folder with ``config.json`` and safetensors, or the id of a model on the hub.
            dtype: of the parameters.
            changes: fields of the config to replace, such as ``hidden_dropout_p=0.0``.

        Raises:
            FileNotFoundError, ImportError: the files, or a package to read them, are missing; says which.
            ValueError: the model is of another kind, or its tensors do not fit; names them.
        """
        with Checkpoint(folder_or_hub_id, cls.config_class) as checkpoint:
            config = checkpoint.replace(**{"pooler": checkpoint.has_pooler, **changes})
            with torch.device("meta"):
                model = cls(config)  # type: ignore[call-arg, arg-type]
            load_weights(model, checkpoint, dtype)
        return model.eval()

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        unpad: bool = False,
        output_hidden_states: bool = False,
        output_scores: bool = False,
    ) -> EncoderOutput:
        """Runs on a padded batch, on packed rows, or packs a padded batch itself.

        Args:
            input_ids: (B, N), int64 or int32.
            mask: (B, N), bool or integer, true for a real token, in any pattern; all are real without it.
            token_type_ids: (B, N) or (1, N), 0 by default.
            position_ids: (B, N) or (1, N); by default BERT, DistilBERT and ALBERT count columns, so
                left-padded rows want their own, and RoBERTa counts the tokens that are not padding.
            cu_seqlens: int32 (number of sequences + 1): the sequences stand end to end in B = 1, positions
                start anew in each. Excludes ``mask``.
            unpad: pack the real tokens of the padded batch, run on them alone and put the results back: the
                same numbers at real tokens, 0 elsewhere, at the cost of the real tokens only. Reads the
                number of tokens back from the device.
            output_hidden_states: also return the embeddings and the output of every layer.
            output_scores: also return every layer's score map before softmax, 0 at masked pairs.

        Raises:
            ValueError, TypeError: an argument does not fit, or an id has no row in its table (off the CPU:
                where the shapes tell). Names the argument; with ``unpad`` the place is that among the packed
                tokens.
        """
        outputs = {"output_hidden_states": output_hidden_states, "output_scores": output_scores}
        if unpad:
            refuse_packed(cu_seqlens)
            return run_unpadded(self, self.config, input_ids, mask, token_type_ids, position_ids, **outputs)
        hidden = self.embed(input_ids, mask, token_type_ids, position_ids, cu_seqlens)
        mask = None if mask is None else mask != 0
        states, scores = [hidden], []
        for layer in self.layers:
            hidden, layer_scores = layer(hidden, mask, cu_seqlens, output_scores)
            states.append(hidden)
            scores.append(layer_scores)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(first_tokens(hidden, mask, cu_seqlens)).tanh()
        return EncoderOutput(
            last_hidden_state=hidden,
            pooler_output=pooled,
            hidden_states=tuple(states) if output_hidden_states else None,
            scores=tuple(scores) if output_scores else None,
        )

    def embed(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Checks the arguments of :meth:`forward`; returns what the first layer takes (B, N, hidden_size)."""
        _checks.check_ids(input_ids, token_type_ids=token_type_ids, position_ids=position_ids)
        _checks.check_rows(mask, cu_seqlens, input_ids[:, None, :, None])
        if token_type_ids is not None and self.config.type_vocab_size == 0:
            raise ValueError(f"token_type_ids must be None: {self.config.family} has no token types")
        if position_ids is None:
            position_ids = positions_of(input_ids, self.config, cu_seqlens)
        return self.embeddings(input_ids, token_type_ids, position_ids, cu_seqlens=cu_seqlens)


def refuse_packed(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens does not go with unpad: the rows are packed already")


@torch.no_grad()
def initialize(module: nn.Module, config: EncoderConfig) -> None:
    """BERT's start: weights from N(0, initializer_range), biases and padding rows 0, LayerNorms 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.weight.normal_(0.0, config.initializer_range)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            part.weight[part.padding_idx].zero_()
        if isinstance(part, nn.LayerNorm):
            part.weight.fill_(1.0)
        bias = getattr(part, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.zero_()
