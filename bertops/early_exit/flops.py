"""What layers and exit classifiers cost, counted; a multiplication with its addition is two FLOPs."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from bertops.models.encoder import Encoder
    from bertops.models.fastbert import FastBert


def encoder_flops(encoder: "Encoder", length: int) -> int:
    """FLOPs of an encoder on a sequence of ``length`` tokens, without its pooler.

    The linear layers of embeddings and layers, and the two products of attention: 22.35 G for BERT-base at
    128 tokens. A shared layer counts every time it runs.
    """
    embeddings = 2 * length * linear_weights(encoder.embeddings)
    return embeddings + sum(block_flops(layer, length) for layer in encoder.layers)


def block_flops(layer: nn.Module, length: int) -> int:
    """FLOPs of one layer of an encoder: its linear layers and the two products of attention."""
    width: int = layer.attention.proj.in_features  # type: ignore[union-attr, assignment]
    return 2 * length * linear_weights(layer) + 4 * length**2 * width


def linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def layer_flops(model: "FastBert", layer: int, length: int) -> int:
    """FLOPs of an encoder layer, counted from 1, on a sequence of ``length`` tokens.

    1862 M for a layer of BERT-base at 128 tokens.
    """
    return block_flops(model.encoder.layers[layer - 1], length)


def classifier_flops(model: "FastBert", length: int) -> int:
    """FLOPs of one exit classifier on a sequence of ``length`` tokens.

    Every token is narrowed, gives a score to each head and takes part in its mean: 25.5 M for BERT-base at
    128 tokens. All else is done for the first token alone.
    """
    classifier = model.teacher
    width, size, heads = classifier.narrow.in_features, classifier.narrow.out_features, classifier.num_heads
    per_token = width * size + 2 * heads * size
    first_token = 5 * size**2 + size * model.num_labels  # query, key, value, proj, dense; logits
    return 2 * length * per_token + 2 * first_token


def full_flops(model: "FastBert", length: int) -> int:
    """FLOPs of every layer and the teacher's classifier: what a model without exits costs."""
    layers = range(1, model.num_layers + 1)
    return sum(layer_flops(model, layer, length) for layer in layers) + classifier_flops(model, length)


def exit_flops(model: "FastBert", layer: int, length: int) -> int:
    """FLOPs of a sequence that is answered at ``layer``: the layers so far, and a classifier behind each."""
    layers = range(1, layer + 1)
    return sum(layer_flops(model, i, length) for i in layers) + layer * classifier_flops(model, length)
