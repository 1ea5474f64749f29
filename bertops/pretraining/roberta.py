"""RoBERTa's pretraining (Liu et al. 2019): a masked language model on full sentences, and nothing else."""

from torch import Tensor

from bertops.data import DynamicMasker, SentenceBlocks, TokenCorpus
from bertops.models import BertConfig, BertForMaskedLM
from bertops.models.heads import MaskedLM
from bertops.pretraining.masked_lm import count_masked, masked_lm_sums
from bertops.pretraining.recipe import Recipe
from bertops.pretraining.settings import RobertaSettings
from bertops.pretraining.text import Text
from bertops.training import Objective


class Roberta(Recipe[RobertaSettings]):
    """Byte-level BPE (section 4.4); blocks of full sentences that may span documents (section 4.2).

    Masks are drawn anew in every epoch, or with ``masking="static"`` once (section 4.1); there is no next
    sentence prediction.
    """

    title = "RoBERTa, pretrained from scratch"
    tokenizer = "bpe"
    templates = ("<s> $A </s>", "<s> $A </s> </s> $B </s>")

    def masker(self, corpus: Text) -> DynamicMasker:
        special = corpus.special
        return DynamicMasker(
            corpus.vocab_size, special.mask_token_id, special, self.settings.mask_prob, self.settings.seed
        )

    def examples(self, corpus: Text, part: TokenCorpus) -> SentenceBlocks:
        return SentenceBlocks(part, self.settings.length, corpus.special)

    def model(self, corpus: Text) -> BertForMaskedLM:
        settings, pad = self.settings, corpus.special.pad_token_id
        config = BertConfig(
            family="roberta",
            vocab_size=corpus.vocab_size,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            intermediate_size=settings.intermediate_size,
            layer_norm_eps=1e-5,
            max_position_embeddings=settings.length + pad + 1,  # positions start behind the padding's id
            type_vocab_size=1,
            pad_token_id=pad,
            position_offset=pad + 1,
            hidden_dropout_p=settings.dropout,
            attention_dropout_p=settings.dropout,
            attention_output_dropout_p=settings.dropout,
            pooler=False,
        )
        return BertForMaskedLM(config)

    def objective(self, model: MaskedLM) -> Objective:
        return MaskedLanguageModeling(model)


class MaskedLanguageModeling(Objective):
    """Minimises the mean of -ln p over the masked tokens."""

    def __init__(self, model: MaskedLM) -> None:
        super().__init__()
        self.model, self.weights = model, {"mlm": 1.0}

    def counts(self, batch: dict[str, Tensor]) -> dict[str, int]:
        masked = count_masked(batch["labels"])
        return {"mlm": masked, "mlm_accuracy": masked, "tokens": batch["input_ids"].numel()}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        encoded = self.model.encoder(batch["input_ids"], cu_seqlens=batch["cu_seqlens"])
        return masked_lm_sums(self.model, encoded.last_hidden_state, batch["labels"])
