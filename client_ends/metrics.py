"""Scores of predictions, as the libraries that everybody quotes compute them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from splitfl.errors import ConfigError

__all__ = ["classified", "rouge"]

_MEND = "install what scores it: pip install 'splitfl[eval]'"


def classified(labels: Sequence[int], predicted: Sequence[int]) -> dict[str, float]:
    """Accuracy, and F1 as the mean over the classes there are (scikit-learn's ``macro``)."""
    try:
        from sklearn.metrics import accuracy_score, f1_score
    except ImportError:
        raise ConfigError(f"accuracy and F1 come from scikit-learn, which is not there: {_MEND}") from None
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1_macro": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
    }


def rouge(references: Sequence[str], written: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L, F measure, mean over the texts (Lin 2004; Google's ``rouge-score`` with stemming)."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError(f"ROUGE comes from rouge-score, which is not there: {_MEND}") from None
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer: Any = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(reference, text) for reference, text in zip(references, written, strict=True)]
    return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in kinds}
