"""Every example runs, against a real server, with a small model."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitfl.sample import build_sample_model, sample_text
from tests.integration.test_commands import ENVIRONMENT, Run, finish

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ROOT = EXAMPLES.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "sample"
    build_sample_model(path, seed=0, hidden=32, blocks=4)
    return str(path)


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "notes.txt"
    file.write_text(sample_text()[:6000], encoding="utf-8")
    return file


def example(name: str, *words: object, reads: str = "") -> str:
    """Run it; returns what it prints."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, words)],
        input=reads,
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def told(run: Run) -> list[object]:
    return ["--trunk", run.join, "--identity", run.keys[0], "--model", run.model]


@pytest.fixture
def serve(tmp_path, model):
    runs = []

    def start(*settings: object) -> Run:
        runs.append(Run(tmp_path, model, 1, *settings))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


def test_plain_loop(serve, text):
    out = example("plain_loop.py", *told(serve()), "--data", text, "--steps", 11, "--length", 32)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 3
    assert losses[1] < losses[0]


def test_trainer_and_its_resuming(serve, text, tmp_path, model):
    run = serve("--checkpoint-every", 4)
    words = [*told(run), "--data", text, "--length", 32, "--out", tmp_path / "out"]
    example("trainer.py", *words, "--steps", 8)
    assert {"checkpoint-4", "checkpoint-8"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "eval_loss" in example("trainer.py", *words, "--steps", 12, "--resume")
    assert [event["step"] for event in run.events("server", "step")] == list(range(12))


def test_sft(serve, tmp_path):
    pytest.importorskip("trl")
    pieces = [sample_text()[begin : begin + 40] for begin in range(0, 1600, 40)]
    pairs = [{"prompt": one, "completion": two} for one, two in zip(pieces[::2], pieces[1::2], strict=True)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run = serve()
    example("sft.py", *told(run), "--data", tmp_path / "pairs.jsonl", "--steps", 3)
    example("sft.py", *told(run), "--data", tmp_path / "pairs.jsonl", "--steps", 3, "--packing")
    assert len(run.events("server", "step")) == 6


def test_preferences(serve, tmp_path):
    pytest.importorskip("trl")
    pieces = [sample_text()[begin : begin + 30] for begin in range(0, 1440, 30)]
    names = ("prompt", "chosen", "rejected")
    rows = [dict(zip(names, pieces[begin : begin + 3], strict=True)) for begin in range(0, len(pieces), 3)]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = serve()
    out = example("dpo.py", *told(run), "--data", tmp_path / "preferences.jsonl", "--steps", 6)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # nothing has been learnt, so the reference says the same
    assert losses[-1] < losses[0]
    assert len(run.events("server", "step")) == 6


@pytest.mark.parametrize("template", ["", "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"])
def test_chat(serve, model, tmp_path, template):
    """As the whole model answers to all that was said before."""
    lines = ["Good morning.", "What is it?", "And then?"]
    run = serve()
    words = told(run)
    if template:
        words[-1] = shutil.copytree(model, tmp_path / "with-template")
        (tmp_path / "with-template" / "chat_template.jinja").write_text(template)
    answers = example("chat.py", *words, "--max-new-tokens", 12, reads="".join(f"{line}\n" for line in lines))
    tokenizer, whole = AutoTokenizer.from_pretrained(words[-1]), AutoModelForCausalLM.from_pretrained(model).eval()
    said, messages, expected = torch.empty(1, 0, dtype=torch.long), [], ""
    for line in lines:
        messages.append({"role": "user", "content": line})
        if template:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        else:
            new = tokenizer(f"{line}\n", add_special_tokens=not said.numel(), return_tensors="pt").input_ids
            ids = torch.cat([said, new], 1)
        said = whole.generate(ids, max_new_tokens=12, do_sample=False)
        answer = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert answers == expected


def test_classification(serve, data):
    sst2 = data / "text" / "sst2"
    words = ["--train", sst2 / "train.tsv", "--dev", sst2 / "dev.tsv", "--steps", 5, "--rows", 200]
    assert re.search(r"accuracy 0\.\d", example("classify_sst2.py", *told(serve()), *words))


def test_moving_from_central_code_changes_no_loss(serve, text, model):
    run = serve("--trainables", "full", "--clip", 1, "--clipping", "joint")
    words = ["--model", model, "--data", text, "--steps", 10]
    central = [float(line) for line in example("moving_from_central.py", *words).split()]
    split = [float(line) for line in example("moving_from_central.py", *words, *told(run)[:4]).split()]
    assert len(central) == 10
    assert split == pytest.approx(central, rel=1e-4)  # five digits are printed


def test_two_organisations(tmp_path, text, model):
    settings = {"SPLITFL": f"{sys.executable} -m splitfl.cli", "ADDRESS": "127.0.0.1:0", "DATA_PORT": "0", "STEPS": "3"}
    environment = ENVIRONMENT | settings | {"PYTHONPATH": str(ROOT)}

    def script(name: str, *words: object) -> subprocess.Popen[str]:
        command = ["sh", str(EXAMPLES / "two_organisations" / name), *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)

    members = ("hospital", "clinic")
    for name in members:
        assert finish(script("member.sh", "key", name))[0] == 0
    operator = script("operator.sh", model, *(f"{name}.key.pub" for name in members))
    try:
        assert operator.stdout is not None
        join = next(line.strip() for line in operator.stdout if line.strip().startswith("splitfl://"))
        trained = [script("member.sh", "train", name, model, join, text) for name in members]
        for process in trained:
            code, _, err = finish(process, 240)
            assert code == 0, err[-2000:]
        assert finish(operator, 60)[0] == 0
    finally:
        if operator.poll() is None:
            operator.kill()
            operator.communicate()
    for name in members:
        assert finish(script("member.sh", "export", name))[0] == 0
        assert (tmp_path / f"{name}-adapter" / "adapter_model.safetensors").exists()
