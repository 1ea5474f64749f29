"""Words that a masked language model would write in a word's place, for TinyBERT's augmentation."""

from typing import TYPE_CHECKING

import torch

from bertops.data.augmentation import NUM_CANDIDATES, NearestWords, whole_words
from bertops.data.text import special_tokens
from bertops.models.heads import MaskedLM

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class MaskedWords:
    """The likeliest whole words at a masked place, beside the text itself as a second segment.

    Args:
        model: in evaluation mode.
        tokenizer: of its vocabulary.
        others: gives the candidates of words of several tokens.
        count: candidates of a word.

    What was found for a text is kept: its variants cost one pass over its masked copies, together.

    Source: Jiao et al. 2020 (TinyBERT), section 3.2 and algorithm 1; its code has the second segment.
    """

    def __init__(
        self, model: MaskedLM, tokenizer: "Tokenizer", others: NearestWords, count: int = NUM_CANDIDATES
    ) -> None:
        self.model, self.tokenizer, self.others, self.count = model, tokenizer, others, count
        ids, self.words = whole_words(tokenizer)
        self.ids = torch.tensor(ids)
        self.special = special_tokens(tokenizer)
        self.longest = model.config.max_position_embeddings - model.config.position_offset
        self._found: dict[str, list[list[str]]] = {}

    def __call__(self, words: list[str]) -> list[list[str]]:
        text = " ".join(words)
        if text not in self._found:
            self._found[text] = self.propose(words)
        return self._found[text]

    @torch.no_grad()
    def propose(self, words: list[str]) -> list[list[str]]:
        found = self.others(words)
        pieces = [self.tokenizer.encode(word, add_special_tokens=False).ids for word in words]
        tokens = [token for piece in pieces for token in piece]
        cls, sep, mask = self.special.cls_token_id, self.special.sep_token_id, self.special.mask_token_id
        row = torch.tensor([cls, *tokens, sep, *tokens, sep])[: self.longest]
        places, place = {}, 1
        for i, piece in enumerate(pieces):
            if len(piece) == 1 and words[i].isalpha() and place < len(row):
                places[i] = place
            place += len(piece)
        if not places:
            return found
        columns = torch.tensor(list(places.values()))
        rows = row.expand(len(columns), -1).clone()
        rows[torch.arange(len(columns)), columns] = mask
        types = None
        if self.model.config.type_vocab_size > 1:
            types = (torch.arange(len(row)) > len(tokens) + 1).long().expand_as(rows)
        hidden = self.model.encoder(rows, token_type_ids=types).last_hidden_state
        logits = self.model.head(hidden[torch.arange(len(columns)), columns], self.model.decoder_weight())
        best = logits[:, self.ids].topk(min(self.count + 1, len(self.ids))).indices.tolist()
        for i, indices in zip(places, best, strict=True):
            proposed = [self.words[j] for j in indices if self.words[j].lower() != words[i].lower()]
            found[i] = proposed[: self.count]
        return found
