"""Examples to token ids and targets.

Targets follow Hugging Face: ``labels`` has the length of ``input_ids``, -100 marks what carries no loss, and the
shift by one happens in the model's loss. So the first position is never predicted: a row whose only target stands
there has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from client_ends.data.chat import IGNORE, render_chat
from client_ends.data.lines import bad_row
from client_ends.data.readers import Examples
from splitfl.errors import ConfigError, DataError

Task = Literal["causal-lm", "sequence-classification"]
_CHUNK = 1000  # rows handed to the tokenizer at once: it works on them in parallel


@dataclass
class TokenizedDataset(Sequence[dict[str, Any]]):
    """Rows ``{"input_ids": [int], "labels": [int]}``; ``labels`` is one int where sequences are classified.

    ``truncated`` rows were cut to the largest length; ``dropped`` rows had nothing left to learn and are not here.
    """

    rows: list[dict[str, Any]]
    task: Task
    truncated: int = 0
    dropped: int = 0
    num_labels: int | None = None
    label_names: list[str] | None = field(default=None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def report(self) -> str:
        """One line for the log: how many rows, how many were cut or left out."""
        parts = [f"{len(self.rows)} rows"]
        if self.truncated:
            parts.append(f"{self.truncated} truncated")
        if self.dropped:
            parts.append(f"{self.dropped} dropped for want of a target")
        return ", ".join(parts)


def tokenize(
    examples: Examples,
    tokenizer: Any,
    *,
    max_length: int,
    task: Task,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    separator: str = "",
) -> TokenizedDataset:
    """Token ids and targets of all examples, each at most ``max_length`` tokens.

    Running text is cut into blocks. A document and a completion end with the tokenizer's end-of-sequence token. The
    loss counts the completion only, or the assistant's turns only; ``separator`` is put between prompt and
    completion. Labels that are names are numbered by ``label_names``, or in alphabetical order (give the names where
    clients average their ends, lest a client that lacks a label numbers them otherwise).

    Raises ``DataError`` on a row that cannot be used, or where no row is left, ``ConfigError`` where kind and task do
    not fit.
    """
    if max_length < 2:
        raise ConfigError(f"The largest length is at least 2 tokens, not {max_length}: one to read and one to predict.")
    if task == "sequence-classification":
        if examples.kind != "classification":
            raise ConfigError(
                f"{examples.path} holds {examples.kind} rows, a classifier needs text and label: map them, for example "
                "text=sentence,label=label."
            )
        dataset = _classification(examples, tokenizer, max_length, num_labels, label_names)
    elif task == "causal-lm":
        if examples.kind == "classification":
            raise ConfigError(
                f"{examples.path} holds labels, which a language model does not use: choose the task "
                "sequence-classification, or map text alone."
            )
        dataset = _causal(examples, tokenizer, max_length, separator)
    else:
        raise ConfigError(f"The task is causal-lm or sequence-classification, not {task!r}.")
    if not dataset.rows:
        raise DataError(f"No row of {examples.path} has a target within {max_length} tokens: raise the limit or check the file.")
    return dataset


# --- Causal language modelling. ---------------------------------------------------------------------------------------


def _causal(examples: Examples, tokenizer: Any, max_length: int, separator: str) -> TokenizedDataset:
    if examples.running:
        rows = _blocks(examples, tokenizer, max_length)
    elif examples.kind == "text":
        rows = _documents(examples, tokenizer)
    elif examples.kind == "completion":
        rows = _completions(examples, tokenizer, separator)
    else:
        rows = render_chat(examples, tokenizer)
    dataset = TokenizedDataset([], "causal-lm")
    for ids, labels in rows:
        if len(ids) > max_length:
            dataset.truncated += 1
            ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORE for label in labels[1:]):
            dataset.dropped += 1
        else:
            dataset.rows.append({"input_ids": ids, "labels": labels})
    return dataset


Row = tuple[list[int], list[int]]


def _blocks(examples: Examples, tokenizer: Any, max_length: int) -> Iterator[Row]:
    rest: list[int] = []
    for index, row in enumerate(examples.rows):
        rest += _encode(tokenizer, [row["text"]], special=index == 0)[0]
        whole = len(rest) // max_length * max_length
        for start in range(0, whole, max_length):
            block = rest[start : start + max_length]
            yield block, list(block)
        rest = rest[whole:]
    if rest:
        yield rest, list(rest)


def _documents(examples: Examples, tokenizer: Any) -> Iterator[Row]:
    for chunk in _chunks(examples.rows):
        for ids in _encode(tokenizer, [row["text"] for row in chunk]):
            ids = _end(ids, tokenizer)
            yield ids, list(ids)


def _completions(examples: Examples, tokenizer: Any, separator: str) -> Iterator[Row]:
    for chunk in _chunks(examples.rows):
        prompts = [row["prompt"] + separator for row in chunk]
        encoded_prompts = _encode(tokenizer, prompts)
        wholes = _encode(tokenizer, [prompt + row["completion"] for prompt, row in zip(prompts, chunk, strict=True)])
        for row, prompt, whole in zip(chunk, encoded_prompts, wholes, strict=True):
            prompt = _open(prompt, tokenizer)
            whole = _open(whole, tokenizer)
            if whole[: len(prompt)] != prompt:
                # A token would straddle the border. In generation the prompt is encoded alone: so it is here.
                whole = prompt + _encode(tokenizer, [row["completion"]], special=False)[0]
            ids = _end(whole, tokenizer)
            yield ids, [IGNORE] * len(prompt) + ids[len(prompt) :]


def _open(ids: list[int], tokenizer: Any) -> list[int]:
    """Without the end-of-sequence token that some tokenizers append by themselves."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _end(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]


# --- Sequence classification. -----------------------------------------------------------------------------------------


def _classification(
    examples: Examples, tokenizer: Any, max_length: int, num_labels: int | None, label_names: Sequence[str] | None
) -> TokenizedDataset:
    labels, names, count = _number_labels(examples, num_labels, label_names)
    dataset = TokenizedDataset([], "sequence-classification", num_labels=count, label_names=names)
    position = 0
    for chunk in _chunks(examples.rows):
        pairs = [row["text_pair"] for row in chunk] if "text_pair" in chunk[0] else None
        for ids in _encode(tokenizer, [row["text"] for row in chunk], pairs):
            if len(ids) > max_length:
                dataset.truncated += 1
            dataset.rows.append({"input_ids": ids[:max_length], "labels": labels[position]})
            position += 1
    return dataset


def _number_labels(
    examples: Examples, num_labels: int | None, label_names: Sequence[str] | None
) -> tuple[list[int], list[str] | None, int]:
    given = [row["label"] for row in examples.rows]
    names = list(label_names) if label_names else None
    numeric = all(isinstance(label, int) or label.strip().isdecimal() for label in given)
    if names is None and not numeric:
        if any(isinstance(label, int) for label in given):
            line = next(n for n, label in zip(examples.lines, given, strict=True) if isinstance(label, int))
            raise bad_row(examples.path, line, "the label is a number where others are names; use one of the two.")
        names = sorted(set(given))
    if names is not None and not (numeric and not set(given) <= set(names)):
        numbers = {name: number for number, name in enumerate(names)}
        for line, label in zip(examples.lines, given, strict=True):
            if label not in numbers:
                raise bad_row(examples.path, line, f"the label {label!r} is none of {', '.join(names)}; mend it.")
        labels = [numbers[label] for label in given]
    else:
        labels = [int(label) for label in given]
    count = num_labels or (len(names) if names else max(2, max(labels) + 1))
    for line, number in zip(examples.lines, labels, strict=True):
        if not 0 <= number < count:
            raise bad_row(
                examples.path, line, f"the label {number} is not below the number of labels, {count}; mend one of them."
            )
    return labels, names, count


# --- The tokenizer. ---------------------------------------------------------------------------------------------------


def _encode(tokenizer: Any, texts: list[str], pairs: list[str] | None = None, *, special: bool = True) -> list[list[int]]:
    # verbose=False: a text longer than the model's window is cut here, the tokenizer need not warn of it.
    encoded = tokenizer(texts, pairs, add_special_tokens=special, verbose=False, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _chunks(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), _CHUNK):
        yield rows[start : start + _CHUNK]
