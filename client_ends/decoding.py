"""A key-value cache in three parts: the client's first blocks, the trunk, the client's last blocks.

Hugging Face's ``generate()`` gets an ordinary ``Cache``. Of the blocks held here it keeps keys and values; those of the trunk's
blocks lie in the trunk, by *sequence*, and the cache only knows which. Whatever is done to it (reordered for beam search, cropped
after speculation, rows repeated or chosen) is done to the trunk's part by the next forward, which says what each row follows.

What the trunk has lost, to other clients' sequences or with a lost session, is sent again. So the input end's output is kept,
which is about as large as the keys and values of one block.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from client_ends.session import TrunkSession
from splitfl.errors import CacheLost, ModelError, UserError
from splitfl.parts.ends import TrunkCache
from splitfl.parts.segments import Segments, check_layout, segments_of, unpack
from splitfl.protocol.data import NO_PARENT

__all__ = ["SplitCache"]

#: How often what the trunk has lost is sent again before that is taken for an error: others may push it out while it comes.
_ATTEMPTS = 8

#: Rows of one message: what is said of each must fit into its metadata.
_MOST_ROWS = 1024


class _TrunkLayer(CacheLayerMixin):
    """Stands where a block of the trunk's keeps its keys and values: knows how many tokens they are of, as masks must."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, sliding_window: int | None) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a block of the trunk has run among the ends")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.sliding_window is None:
            return self.length + query_length, 0
        seen = min(self.length, self.sliding_window - 1)
        return seen + query_length, self.length - seen

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= abs(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None: ...
    def batch_repeat_interleave(self, repeats: int) -> None: ...
    def batch_select_indices(self, indices: torch.Tensor) -> None: ...
    def offload(self) -> None: ...
    def prefetch(self) -> None: ...


class _Sent:
    """The input end's output ``(rows, columns, H)`` in host memory, with room to grow, and which of it is real tokens."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None
        self.columns = 0
        self.pads: list[int] = []  # by row: columns before its first real token
        self.starts: list[int] = []  # by row: the position of its first real token

    def append(self, h: torch.Tensor, new: Segments) -> None:
        """The next columns, of which ``new`` says what is real. Raises ModelError where a row does not run on."""
        (rows, columns, width), before = h.shape, self.columns
        if self._memory is None:
            self._memory = h.new_empty((rows, 0, width))
            self.pads, self.starts = [0] * rows, [0] * rows
        found = {item.row: item for item in new}
        for row in range(rows):
            item = found.get(row)
            if (self.real(row) > 0) if item is None else (item.begin + item.length < columns):
                raise ModelError(f"row {row} is padded on its right, where a key-value cache cannot go on: pad on the left")
            if not self.real(row):
                self.pads[row] = before + (columns if item is None else item.begin)
                self.starts[row] = 0 if item is None else item.start
            elif item is not None and item.start != self.starts[row] + self.real(row):
                raise ModelError(f"the positions of row {row} do not run on from its key-value cache")
        end = before + columns
        if self._memory.shape[1] < end:
            larger = h.new_empty((rows, max(end, 2 * self._memory.shape[1], 64), width))
            larger[:, :before] = self._memory[:, :before]
            self._memory = larger
        self._memory[:, before:end] = h
        self.columns = end

    def take_back(self, columns: int) -> None:
        self.columns -= columns
        self.pads = [min(pads, self.columns) for pads in self.pads]

    def choose(self, rows: list[int]) -> None:
        """These rows, in this order; a row may come several times."""
        if self._memory is None:
            return
        memory = self._memory
        self._memory = memory.new_empty((len(rows), *memory.shape[1:]))
        self._memory[:, : self.columns] = memory[torch.tensor(rows), : self.columns]
        self.pads, self.starts = [self.pads[row] for row in rows], [self.starts[row] for row in rows]

    def real(self, row: int) -> int:
        """How many real tokens the row has."""
        return self.columns - self.pads[row]

    def tokens(self, row: int, begin: int, end: int) -> torch.Tensor:
        """Its real tokens ``begin..end``: (tokens, H)."""
        assert self._memory is not None
        return self._memory[row, self.pads[row] + begin : self.pads[row] + end]


class SplitCache(Cache, TrunkCache):
    """Made by ``model.make_cache()`` or by ``generate()`` itself; used as any ``DynamicCache``, of one batch.

    A copy (``copy.deepcopy``) goes its own way: its part in the trunk is sent again when it is used.
    """

    def __init__(self, config: Any, held_by_trunk: range, session: TrunkSession, adapter_on: Callable[[], bool]) -> None:
        layers: list[Any] = DynamicCache(config=config.get_text_config(decoder=True)).layers
        for index in held_by_trunk:
            layers[index] = _TrunkLayer(getattr(layers[index], "sliding_window", None))
        super().__init__(layers=layers)
        self._trunk_layers = [layers[index] for index in held_by_trunk]
        self._session, self._adapter_on = session, adapter_on
        self._sent = _Sent()
        self._numbers: list[int] = []  # by row: its sequence in the trunk
        self._parents: list[int] = []  # by row: the sequence in the trunk that it follows; NO_PARENT: none is there
        self._broken = False
        self._mine: list[int] = []  # all sequences that were ever ours
        weakref.finalize(self, session.release_later, self._mine)

    # --- what is done to a cache ------------------------------------------------------------------------------------------------

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._choose(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        rows = len(self._parents)
        self._choose(torch.arange(rows)[indices.to("cpu")].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._choose([row for row in range(len(self._parents)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._sent.take_back(abs(tokens_to_remove))

    def reset(self) -> None:
        super().reset()
        self._session.release_later(self._numbers)
        self._sent, self._numbers, self._parents, self._broken = _Sent(), [], [], False

    def __deepcopy__(self, memo: dict[int, Any]) -> SplitCache:
        twin = type(self).__new__(type(self))
        apart = {"_session", "_adapter_on", "_trunk_layers", "_mine"}
        twin.__dict__ |= {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items() if name not in apart}
        twin._session, twin._adapter_on, twin._mine = self._session, self._adapter_on, []
        twin._trunk_layers = [layer for layer in twin.layers if isinstance(layer, _TrunkLayer)]
        twin._numbers, twin._parents = [], [NO_PARENT] * len(self._parents)
        weakref.finalize(twin, self._session.release_later, twin._mine)
        return twin

    def _choose(self, rows: list[int]) -> None:
        if not self._parents:
            return
        self._sent.choose(rows)
        self._parents = [self._parents[row] for row in rows]

    # --- a forward --------------------------------------------------------------------------------------------------------------

    def trunk_forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """See :class:`TrunkCache`. Real tokens travel alone, as in training.

        Raises:
            ModelError: rows that cannot be kept. UserError: the trunk has no room for them. SessionLost.
        """
        if torch.is_grad_enabled():
            raise ModelError("a key-value cache is for generation: call the model under torch.no_grad(), or without a cache")
        if self._broken:
            raise UserError("a forward was broken off amid this key-value cache: begin with a new one")
        self._broken = True
        new = self._new_segments(hidden_states, attention_mask, position_ids)
        y = self._mended(new)
        for layer in self._trunk_layers:
            layer.length += hidden_states.shape[1]
        self._broken = False
        return unpack(y.to(hidden_states.device, hidden_states.dtype), new)

    def _new_segments(self, h: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> Segments:
        """The real ones of the new tokens, one segment a row at most; they are put to what was sent of the rows."""
        (rows, columns), before = h.shape[:2], self._sent.columns
        if self._parents and len(self._parents) != rows:
            raise ModelError(f"{rows} rows, and a key-value cache of {len(self._parents)}")
        if attention_mask is not None and tuple(attention_mask.shape) != (rows, before + columns):
            raise ModelError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but with its cache the batch has {rows} rows of "
                f"{before + columns} tokens"
            )
        check_layout(attention_mask, None)
        if position_ids is None:
            position_ids = torch.arange(before, before + columns)[None].expand(rows, -1)
        new = segments_of(None if attention_mask is None else attention_mask[:, -columns:], position_ids, (rows, columns))
        if len({item.row for item in new}) < len(new):
            raise ModelError("sequences packed into one row have no key-value cache: give each a row of its own")
        self._sent.append(h.detach().to("cpu", self._session.dtype), new)
        self._parents = self._parents or [NO_PARENT] * rows
        while len(self._numbers) < rows:
            self._numbers.append(self._session.new_sequence())
            self._mine.append(self._numbers[-1])
        return new

    # --- what travels -----------------------------------------------------------------------------------------------------------

    def _mended(self, new: Segments) -> torch.Tensor:
        """The trunk's answer ``(tokens, H)`` to the new tokens; what it has lost is sent again first."""
        sent = self._sent
        now = {item.row: sent.real(item.row) for item in new}
        try:
            answers = self._run([(item.row, now[item.row] - item.length, now[item.row]) for item in new])
        except CacheLost:
            for attempt in range(_ATTEMPTS):
                self._parents = [NO_PARENT] * len(self._parents)
                try:
                    whole = self._run([(row, 0, sent.real(row)) for row in range(len(self._parents)) if sent.real(row)])
                    break
                except CacheLost:
                    if attempt + 1 == _ATTEMPTS:
                        raise
            rows = [row for row in range(len(self._parents)) if sent.real(row)]
            answers = [whole[rows.index(item.row)][-item.length :] for item in new]
        self._session.release_later(self._numbers[len(self._parents) :])
        del self._numbers[len(self._parents) :]
        return torch.cat(answers) if answers else torch.empty(0, 0)

    def _run(self, spans: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """The trunk on the real tokens ``begin..end`` of some rows: (end - begin, H) each. Raises CacheLost."""
        limit = self._session.max_rows
        if any(begin and self._parents[row] == NO_PARENT for row, begin, _ in spans):
            raise CacheLost("a copy of a cache has nothing in the trunk yet")
        several = len(spans) > _MOST_ROWS or sum(end - begin for _, begin, end in spans) > limit
        if several and any(self._parents[row] not in (NO_PARENT, self._numbers[row]) for row, _, _ in spans):
            # All that a message reads is meant as it was before it; with the next one that holds no more.
            raise CacheLost("rows that change places do not fit into one message")
        answers: list[list[torch.Tensor]] = [[] for _ in spans]
        at = [begin for _, begin, _ in spans]
        while True:
            room = limit
            message: list[tuple[int, int, int, int]] = []
            for index, (row, _, end) in enumerate(spans):
                taken = min(end - at[index], room)
                if taken and len(message) < _MOST_ROWS:
                    message.append((index, row, at[index], at[index] + taken))
                    at[index], room = at[index] + taken, room - taken
            if not message:
                return [part[0] if len(part) == 1 else torch.cat(part) for part in answers]
            out = self._exchange([span for _, *span in message])
            for (index, *_), part in zip(message, out, strict=True):
                answers[index].append(part)

    def _exchange(self, spans: list[list[int]]) -> Sequence[torch.Tensor]:
        """One message and its answer."""
        sent, session = self._sent, self._session
        parts = [sent.tokens(row, begin, end) for row, begin, end in spans]
        number = session.send_forward(
            parts[0] if len(parts) == 1 else torch.cat(parts),
            [(end - begin, sent.starts[row] + begin) for row, begin, end in spans],
            train=False,
            grad=False,
            adapter_on=self._adapter_on(),
            sequences=[(self._numbers[row], (self._parents[row], begin) if begin else (NO_PARENT, 0)) for row, begin, _ in spans],
        )
        try:
            y = session.await_hidden(number)
        finally:
            session.forget(number)
        for row, _, _ in spans:
            self._parents[row] = self._numbers[row]
        return y.split([end - begin for _, begin, end in spans])
