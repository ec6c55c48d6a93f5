"""Is the student better: sampling answers, grading them, and numbers with intervals."""

from oprd.evaluation.grading import Verdict, extract_boxed, grade, judge
from oprd.evaluation.metrics import (
    PairedComparison,
    avg_at_k,
    avg_per_problem,
    best_at_k,
    best_per_problem,
    bootstrap_interval,
    distinct_n,
    distinct_per_problem,
    paired_comparison,
    pass_at_k,
    pass_per_problem,
)

__all__ = [
    "PairedComparison",
    "Verdict",
    "avg_at_k",
    "avg_per_problem",
    "best_at_k",
    "best_per_problem",
    "bootstrap_interval",
    "distinct_n",
    "distinct_per_problem",
    "extract_boxed",
    "grade",
    "judge",
    "paired_comparison",
    "pass_at_k",
    "pass_per_problem",
]
