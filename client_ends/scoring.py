"""What ``splitfl eval`` measures: a model that is joined on rows of a file, or on tasks of the lm-eval harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from client_ends.data import Batches, TokenizedDataset, collate, pad_token
from client_ends.data.chat import IGNORE
from client_ends.evaluation import go_through
from client_ends.metrics import classified, rouge
from splitfl.errors import ConfigError, DataError

__all__ = ["harness_scores", "score_rows", "score_texts"]


def score_rows(model: Any, rows: TokenizedDataset, tokenizer: Any, *, batch_size: int) -> dict[str, float]:
    """Loss over targets, with perplexity, or accuracy and F1 of a classifier."""
    batches = Batches(rows, batch_size, seed=0, pad_token_id=pad_token(tokenizer), shuffle=False)
    made = go_through(model, batches, _device_of(model))
    return made.report() | (classified(made.labels, made.predicted) if made.labels else {})


@torch.no_grad()
def score_texts(
    model: Any, rows: TokenizedDataset, tokenizer: Any, *, batch_size: int, new_tokens: int
) -> tuple[dict[str, float], list[str]]:
    """ROUGE of what the model writes, greedily and at most ``new_tokens``, where each row's targets begin, against those up to
    the first token that is none: of a dialogue its first answer. And the texts. Raises DataError where no row has a prompt.
    """
    prompts, references = [], []
    for row in rows:
        labels = row["labels"]
        begin = next(place for place, label in enumerate(labels) if label != IGNORE)
        end = next((place for place in range(begin, len(labels)) if labels[place] == IGNORE), len(labels))
        if begin:
            prompts.append({"input_ids": row["input_ids"][:begin], "labels": [IGNORE] * begin})
            references.append(tokenizer.decode(row["input_ids"][begin:end], skip_special_tokens=True))
    if not prompts:
        raise DataError("nothing to write: --generate wants rows with a prompt and its completion, or a chat")
    pad, device = pad_token(tokenizer), _device_of(model)
    was_training = model.training
    model.eval()
    written: list[str] = []
    for first in range(0, len(prompts), batch_size):
        batch = collate(prompts[first : first + batch_size], pad_token_id=pad, padding_side="left")
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad)
        written += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return rouge(references, written), written


def harness_scores(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Scores by task, as the lm-eval harness computes them (https://github.com/EleutherAI/lm-evaluation-harness).

    The model is handed to the harness as any other of Hugging Face's: what the harness asks of it, prompts and answers, stays
    in this process. ``include``: a directory with tasks of one's own, as YAML.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("--tasks takes the lm-eval harness, which is not there: pip install 'splitfl[eval]'") from None
    manager = None
    if include is not None:  # to look at the thousands that come with the harness takes seconds
        manager = TaskManager(include_path=str(include), include_defaults=False)
    # What is no plain task has members, which may be the harness's own.
    if manager is None or any(task not in manager.all_subtasks for task in tasks):
        manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        where = f"{include} or " if include else ""
        raise ConfigError(f"no task {unknown[0]!r} in {where}the harness: name its directory with --include-path")
    harness: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
    found: Any = simple_evaluate(
        harness, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    # "acc,none" is the metric before any filter; what is no number is its name, or a deviation that was not asked for.
    return {
        task: {name.removesuffix(",none"): float(value) for name, value in scores.items() if isinstance(value, int | float)}
        for task, scores in found["results"].items()
    }


def _device_of(model: Any) -> torch.device:
    device: torch.device = next(iter(model.parameters())).device
    return device
