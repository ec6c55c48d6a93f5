"""Is the student better: sampling answers, grading them, and numbers with intervals."""

from oprd.evaluation.grading import extract_boxed, grade
from oprd.evaluation.metrics import avg_at_k, best_at_k, bootstrap_interval, distinct_n, pass_at_k

__all__ = ["avg_at_k", "best_at_k", "bootstrap_interval", "distinct_n", "extract_boxed", "grade", "pass_at_k"]
