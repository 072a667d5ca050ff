"""CB and COPA are asked and scored as in the harness; only where their rows lie is ours."""

from lm_eval.tasks.super_glue.cb.aggregate import cb_multi_fi
from lm_eval.tasks.super_glue.copa.utils import doc_to_choice, doc_to_target, doc_to_text

__all__ = ["cb_multi_fi", "doc_to_choice", "doc_to_target", "doc_to_text"]
