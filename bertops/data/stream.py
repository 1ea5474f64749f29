"""Batches for pretraining: shuffled, sharded, masked, and the same again after a restart."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertops.data._host import MAX_TOKENS, check_epoch, check_range, check_seed, host
from bertops.data.examples import Examples
from bertops.data.masking import DynamicMasker

Batch = dict[str, NDArray[Any]]


class PretrainingStream:
    """The batches of one rank, epoch after epoch.

    Batch ``step`` of an epoch is a function of the arguments, the epoch and the step: ``stream[step]``
    makes it on its own, in any order, in any process or thread. Of a global batch of ``world * batch_size``
    sequences rank r takes the r-th part, so that a run on other ranks sees the same global batches where
    that product is the same.

    Iterating makes the batches from (``epoch``, ``step``) to the end of the epoch and moves on to the next;
    breaking off and iterating again continues. ``state_dict`` says where it stands::

        for batch in stream:                          # one epoch, or the rest of it
            train(**{name: torch.from_numpy(array) for name, array in batch.items()})
            torch.save(stream.state_dict(), "stream.pt")     # resumes after this batch

    Worker processes of PyTorch make the same batches, as tensors::

        loader = DataLoader(stream, batch_size=None, num_workers=4, sampler=range(step, len(stream)))

    for one epoch (``stream.set_epoch(epoch, step)`` before it is made; the loader does not move the stream).

    A batch is a dict of arrays: ``input_ids`` and ``labels`` int64, -100 at what is not predicted, and

    - padded: both (B, length); ``mask`` (B, length) bool, true for a real token;
    - ``packed``: both (T,); ``cu_seqlens`` (B + 1,) int32; ``position_ids`` (T,) int64, from 0 in each;
    - of pairs: ``token_type_ids`` of their shape, ``sentence_order_label`` or ``next_sentence_label`` (B,),
      int64.

    Args:
        examples: ``SentenceBlocks``, ``SentenceOrderPairs`` or ``NextSentencePairs``.
        masker: chooses the tokens to predict.
        batch_size: sequences of this rank's batch.
        seed: of the order, 64 bits; the masks and the pairs have seeds of their own.
        shuffle: another order in every epoch; otherwise that of the corpus.
        drop_last: leave out the sequences that do not fill a global batch. Otherwise the last batch is
            smaller, which several ranks cannot share.
        rank, world: which of how many ranks this is.
        packed: sequences end to end, without padding.
        static: every epoch has the masks (and pairs) of epoch 0; only the order changes.

    Raises:
        ValueError: an argument out of range, or ``drop_last=False`` with several ranks.
    """

    def __init__(
        self,
        examples: Examples,
        masker: DynamicMasker,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
        packed: bool = False,
        static: bool = False,
    ) -> None:
        self.examples, self.masker = examples, masker
        self.batch_size = check_range("batch_size", batch_size, 1, MAX_TOKENS)
        self.seed, self.shuffle, self.drop_last = check_seed(seed), shuffle, drop_last
        self.world = check_range("world", world, 1, MAX_TOKENS)
        self.rank = check_range("rank", rank, 0, world - 1)
        self.packed, self.static = packed, static
        if world > 1 and not drop_last:
            raise ValueError(
                f"drop_last=False needs world=1, got {world}: ranks would differ in their batches"
            )
        self._order: tuple[int, NDArray[np.int64]] | None = None
        self.epoch = self.step = 0

    def __len__(self) -> int:
        """Batches of the current epoch."""
        return self.num_steps(self.epoch)

    def num_steps(self, epoch: int) -> int:
        """Batches of an epoch.

        Raises:
            ValueError: the epoch has fewer sequences than one global batch.
        """
        count, together = self.examples.count(self._drawn(epoch)), self.batch_size * self.world
        steps = count // together if self.drop_last else -(-count // together)
        if not steps:
            raise ValueError(
                f"batch_size * world must be at most the {count} sequences of epoch {epoch}, got {together}; "
                "use drop_last=False or a smaller one"
            )
        return steps

    def __getitem__(self, step: int) -> Batch:
        """Batch ``step`` of the current epoch; does not move the stream.

        Raises:
            IndexError: not in [0, len).
        """
        return self.batch(self.epoch, step)

    def batch(self, epoch: int, step: int) -> Batch:
        """Batch ``step`` of any epoch.

        Raises:
            IndexError: not in [0, num_steps(epoch)).
        """
        if not 0 <= step < self.num_steps(epoch):
            raise IndexError(f"step must lie in [0, {self.num_steps(epoch)}), got {step}")
        first = (step * self.world + self.rank) * self.batch_size
        indices = self.order(epoch)[first : first + self.batch_size]
        drawn = self._drawn(epoch)
        rows = self.examples.gather(indices, drawn, packed=self.packed)
        mask, cu_seqlens = rows.mask, rows.cu_seqlens
        if mask is None:
            masked = self.masker(rows.input_ids, indices, drawn, cu_seqlens=cu_seqlens)
            batch: Batch = {"cu_seqlens": cu_seqlens, "position_ids": rows.position_ids}
        else:
            masked = self.masker(rows.input_ids, indices, drawn, mask=mask)
            batch = {"mask": mask}
        batch = {"input_ids": masked.input_ids, "labels": masked.labels, **batch}
        if rows.token_type_ids is not None:
            batch["token_type_ids"] = rows.token_type_ids
        return batch | rows.pair_labels

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The numbers of an epoch's sequences in order, for all ranks; the last one asked for is kept."""
        found = self._order  # one look: another thread may put another epoch there
        if found is None or found[0] != epoch:
            check_epoch(epoch)
            count = self.examples.count(self._drawn(epoch))
            order = host().permutation(count, self.seed, epoch) if self.shuffle else np.arange(count)
            found = self._order = (epoch, order)
        return found[1]

    def _drawn(self, epoch: int) -> int:
        """The epoch that masks and pairs are drawn for."""
        return 0 if self.static else epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        while self.epoch == epoch and self.step < len(self):
            self.step += 1  # a state taken while the batch is in use counts it as seen
            yield self.batch(epoch, self.step - 1)
        if self.epoch == epoch:
            self.set_epoch(epoch + 1)

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Goes to batch ``step`` of ``epoch``.

        Raises:
            ValueError: there is no such batch; the place after an epoch's last one is allowed.
        """
        check_range("step", step, 0, self.num_steps(check_epoch(epoch)))
        self.epoch, self.step = epoch, step

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, the same on all ranks, and what must be the same to resume from there."""
        finished = self.step == len(self)
        place = {"epoch": self.epoch + finished, "step": 0 if finished else self.step}
        return {**place, "of": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where ``state`` was taken.

        Raises:
            ValueError: it is of a stream that makes other global batches; says what differs.
        """
        mine = self._identity()
        other = [
            f"{name} {state['of'].get(name)} (here {mine[name]})"
            for name in mine
            if state["of"].get(name) != mine[name]
        ]
        if other:
            raise ValueError(f"state must be of the same stream, got one with {', '.join(other)}")
        self.set_epoch(state["epoch"], state["step"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "global_batch_size": self.batch_size * self.world,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "static": self.static,
            "length": self.examples.length,
            "tokens": self.examples.corpus.num_tokens,
        }
