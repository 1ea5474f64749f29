"""ALBERT's pretraining (Lan et al. 2020): n-gram masked language model and sentence order."""

from torch import Tensor
from torch.nn import functional as F

from bertops.data import DynamicMasker, SentenceOrderPairs, TokenCorpus, word_starts
from bertops.models import AlbertConfig, AlbertForPreTraining
from bertops.models.heads import MaskedLM
from bertops.pretraining.masked_lm import count_masked, masked_lm_sums
from bertops.pretraining.recipe import Recipe
from bertops.pretraining.settings import AlbertSettings
from bertops.pretraining.text import Text
from bertops.training import Objective

MAX_PREDICTIONS = 20  # masked tokens of a sequence, as in the official code


class Albert(Recipe[AlbertSettings]):
    """Unigram tokenizer, lower case; pairs of consecutive segments, half of them swapped (section 3.1).

    n-grams of whole words are masked with p(n) proportional to 1/n (section 4.1). The official code trains
    with LAMB on 4,096 sequences a step; small batches do with AdamW.
    """

    title = "ALBERT, pretrained from scratch"
    tokenizer = "unigram"
    templates = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    baselines = {"sop_accuracy": 0.5}  # noqa: RUF012

    def masker(self, corpus: Text) -> DynamicMasker:
        special = corpus.special
        return DynamicMasker(
            corpus.vocab_size,
            special.mask_token_id,
            special,
            self.settings.mask_prob,
            self.settings.seed,
            ngram=self.settings.ngram,
            word_starts=word_starts(corpus.tokenizer),
            max_predictions=MAX_PREDICTIONS,
        )

    def examples(self, corpus: Text, part: TokenCorpus) -> SentenceOrderPairs:
        return SentenceOrderPairs(part, self.settings.length, corpus.special, seed=self.settings.seed)

    def model(self, corpus: Text) -> AlbertForPreTraining:
        settings = self.settings
        config = AlbertConfig(
            vocab_size=corpus.vocab_size,
            embedding_size=settings.embedding_size,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            intermediate_size=settings.intermediate_size,
            max_position_embeddings=settings.length,
            pad_token_id=corpus.special.pad_token_id,
            share=settings.share,
            hidden_dropout_p=settings.dropout,
            attention_dropout_p=settings.dropout,
            attention_output_dropout_p=settings.dropout,
            pooler=False,
        )
        return AlbertForPreTraining(config)

    def objective(self, model: MaskedLM) -> Objective:
        assert isinstance(model, AlbertForPreTraining)
        return MaskedLanguageModelingAndSentenceOrder(model)


class MaskedLanguageModelingAndSentenceOrder(Objective):
    """Minimises the mean of -ln p over the masked tokens plus that over the pairs' orders."""

    def __init__(self, model: AlbertForPreTraining) -> None:
        super().__init__()
        self.model, self.weights = model, {"mlm": 1.0, "sop": 1.0}

    def counts(self, batch: dict[str, Tensor]) -> dict[str, int]:
        masked, pairs = count_masked(batch["labels"]), len(batch["sentence_order_label"])
        return {
            "mlm": masked,
            "mlm_accuracy": masked,
            "sop": pairs,
            "sop_accuracy": pairs,
            "tokens": batch["input_ids"].numel(),
        }

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        model, cu_seqlens, swapped = self.model, batch["cu_seqlens"], batch["sentence_order_label"]
        encoded = model.encoder(
            batch["input_ids"], token_type_ids=batch["token_type_ids"], cu_seqlens=cu_seqlens
        )
        hidden = encoded.last_hidden_state
        order = model.order(model.pool(hidden, cu_seqlens=cu_seqlens)).float()
        return {
            **masked_lm_sums(model, hidden, batch["labels"]),
            "sop": F.cross_entropy(order, swapped, reduction="sum"),
            "sop_accuracy": (order.detach().argmax(1) == swapped).sum(),
        }
