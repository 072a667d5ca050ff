"""``splitfl chat``: a conversation, line by line; what was said before is kept in the cache, so only what is new travels."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from client_ends import generate_command
from splitfl.errors import ConfigError

__all__ = ["Conversation", "add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    generate_command.add_arguments(parser, prompt=False)
    parser.add_argument("--system", metavar="TEXT", help="what stands before it all")


def run(args: argparse.Namespace) -> int:
    generate_command.check(args)
    needs = "a conversation goes on from one: use splitfl generate"
    return generate_command.using(args, lambda model, tokenizer: _converse(args, model, tokenizer), needs)


def _converse(args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
    talk = Conversation(model, tokenizer, generate_command.options(args, tokenizer), args.system)
    shown = sys.stdin.isatty()
    while True:
        if shown:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            talk.say(line.rstrip("\n"))


class Conversation:
    """What was said, by the model's chat template, or as plain text where it has none."""

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any], system: str | None = None) -> None:
        from splitfl.parts.ends import find_ends

        ends: Any = find_ends(model)
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._messages = [{"role": "system", "content": system}] if system else []
        self._text = system or ""
        self._cache = ends.make_cache()
        self._cache.activate_past_recording()  # a template may tell what was said in other tokens
        self._ids: list[int] = []  # what the cache has been shown

    def say(self, line: str) -> str:
        """The answer, printed as it comes."""
        import torch
        from transformers import TextStreamer

        ids = self._with(line)
        self._take_back(ids)
        streamer: Any = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        device = self._model.device
        found = self._model.generate(
            torch.tensor([ids], device=device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=device),
            past_key_values=self._cache,
            streamer=streamer,
            **self._options,
        )[0].tolist()
        self._ids = found
        answer: str = self._tokenizer.decode(found[len(ids) :], skip_special_tokens=True)
        self._messages.append({"role": "assistant", "content": answer})
        self._text += answer
        return answer

    def _with(self, line: str) -> list[int]:
        """The tokens of all that was said, and of this line, up to where the answer begins. Raises ConfigError where the chat
        template refuses it.
        """
        self._messages.append({"role": "user", "content": line})
        if self._tokenizer.chat_template:
            from client_ends.data.chat import asked_ids

            try:
                return asked_ids(self._tokenizer, self._messages)
            except ConfigError as error:
                mend = "leave --system out" if self._messages[0]["role"] == "system" else "use a model with another template"
                raise ConfigError(f"{error}: {mend}") from error
        self._text += ("\n" if self._text else "") + line
        return list(self._tokenizer(self._text).input_ids)

    def _take_back(self, ids: list[int]) -> None:
        """Crop the cache to what it has in common with ``ids``, of which one token at least is left to be shown."""
        cached = self._cache.get_seq_length()
        same = 0
        for one, other in zip(self._ids[:cached], ids[:-1], strict=False):
            if one != other:
                break
            same += 1
        if cached:  # an empty one with a window cannot be cropped
            self._cache.crop(same - cached)
