"""Chat rows through the tokenizer's own template, with the loss on the assistant's turns alone.

Where the template marks what the assistant says (``{% generation %}``), its own mask is used. Elsewhere the
conversation is rendered turn by turn: what a turn of the assistant adds to everything before it is what the model has
to produce.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from client_ends.data.lines import bad_row
from client_ends.data.readers import Examples
from splitfl.errors import ConfigError

# Hugging Face's mark of a position that carries no loss.
IGNORE = -100
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render_chat(examples: Examples, tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """``(input_ids, labels)`` of every conversation.

    Raises ``ConfigError`` without a usable template, ``DataError`` for a conversation that the template refuses.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ConfigError(
            "This tokenizer has no chat template to render messages with: use a chat model, or prompt and completion."
        )
    render = _marked if isinstance(template, str) and _GENERATION.search(template) else _by_prefix
    if render is _by_prefix and not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "The assistant's turns cannot be found: this tokenizer gives no character positions and its chat template "
            "no generation marks; use prompt and completion."
        )
    for line, row in zip(examples.lines, examples.rows, strict=True):
        try:
            yield render(row["messages"], tokenizer)
        except _PrefixError:
            raise bad_row(
                examples.path,
                line,
                "the chat template rewrites earlier turns, so the assistant's cannot be told apart; use conversations "
                "with one assistant turn, the last, or prompt and completion.",
            ) from None
        except Exception as error:  # a template raises whatever it likes: jinja's errors, its own raise_exception
            raise bad_row(examples.path, line, f"the chat template refuses these messages ({error}); mend them.") from error


class _PrefixError(Exception):
    """A conversation does not begin with its own beginning."""


def _marked(messages: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[int]]:
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids = list(encoded["input_ids"])
    labels = [token if said else IGNORE for token, said in zip(ids, encoded["assistant_masks"], strict=True)]
    return ids, labels


def _by_prefix(messages: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[int]]:
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not answered.startswith(asked) or not whole.startswith(answered):
            raise _PrefixError
        spans.append((len(asked), len(answered)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = [
        token if any(start <= begin < end for start, end in spans) else IGNORE
        for token, (begin, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return list(encoded["input_ids"]), labels
