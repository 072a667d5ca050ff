"""Chat rows through the tokenizer's own template, with the loss on the assistant's turns alone.

Where the template marks what the assistant says (``{% generation %}``), its own mask is used. Elsewhere the
conversation is rendered turn by turn: what a turn of the assistant adds to everything before it is what the model has
to produce.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from client_ends.data.lines import bad_row
from client_ends.data.readers import Examples
from splitfl.errors import ConfigError, first_line

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
            said = f"the chat template refuses these messages ({first_line(error)}); mend them."
            raise bad_row(examples.path, line, said) from error


def asked_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """The tokens of a conversation up to where the next answer begins, by the tokenizer's chat template.

    Raises ``ConfigError`` where the template refuses it.
    """
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises whatever it likes, as that roles must take turns
        raise ConfigError(f"the chat template refuses these messages ({first_line(error)})") from error
    return list(tokenizer(text, add_special_tokens=False).input_ids)


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
