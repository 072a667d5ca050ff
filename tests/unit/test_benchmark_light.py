"""What light clients replay is what a real client sends."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from benchmarks.light import Recording, record
from benchmarks.stage import VOCABULARY, batch_of, build_model


class Pipe:
    def send(self, _: object) -> None:
        pass

    def recv(self) -> None:
        return None


def test_a_recording_holds_what_crosses_the_cuts(tmp_path):
    model_dir, file = tmp_path / "model", tmp_path / "sent.safetensors"
    build_model(model_dir, hidden=64, blocks=4)
    record(Pipe(), str(model_dir), str(tmp_path), {"trainables": "full"}, 2, 16, str(file))
    sent = Recording.load(file)
    assert (sent.segments, sent.targets, sent.divisor) == ([(16, 0)] * 2, 2 * 15, 2 * 15.0)
    whole = AutoModelForCausalLM.from_pretrained(model_dir).train()
    answer = whole(**batch_of(2, 16, seed=0), output_hidden_states=True)
    answer.hidden_states[-2].retain_grad()
    answer.loss.backward()
    torch.testing.assert_close(sent.hidden, answer.hidden_states[1].flatten(0, 1))
    torch.testing.assert_close(sent.gradient, answer.hidden_states[-2].grad.flatten(0, 1), rtol=1e-4, atol=1e-7)
    assert whole.config.vocab_size == VOCABULARY


def test_random_numbers_have_the_shape_of_a_batch():
    made = Recording.random(3, 8, 16, torch.bfloat16)
    assert made.hidden.shape == made.gradient.shape == (24, 16)
    assert made.hidden.dtype == made.gradient.dtype == torch.bfloat16
    assert (made.segments, made.targets, made.divisor) == ([(8, 0)] * 3, 24, 24.0)
