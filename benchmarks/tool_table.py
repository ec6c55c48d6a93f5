"""The table of docs/results.md with a tool in the loop: objectives at their own best learning rate, three seeds.

    python benchmarks/tool_table.py --build               # train the pair of models, once (2 minutes)
    python benchmarks/tool_table.py                       # run what is missing, then print the table
    python benchmarks/tool_table.py --print               # the table of what has been recorded

Every run has the same budget (benchmarks/tools.yaml): 50 updates of 8 prompts x 2 responses, each of two to four calls, their
results and an answer. Students answer the 64 validation and the 256 test problems with the tool too (k = 4, T = 0.7).
"""

from __future__ import annotations

import sys
from pathlib import Path

from sweeping import Row, Table, main

HERE = Path(__file__).parent
OUT, MODELS = Path("runs/tools"), Path("runs/tools/models")
LENGTH = 160
RECIPE = str(HERE / "tools.yaml")
OPD = {"representation_weight": 0, "logit_weight": 0, "lm_head": "keep"}


class ToolTable(Table):
    """A table whose students call the calculator while they are scored."""

    def score(self, path: Path | str, which: str, max_new_tokens: int) -> dict:
        """Answers to a set of problems, through the trainer's own rollout."""
        from datasets import Dataset
        from tool_task import calculator, problems

        from oprd import OPRDConfig, OPRDTrainer
        from oprd.evaluation.benchmarks import Problem, problem_id
        from oprd.evaluation.evaluate import draw
        from oprd.evaluation.sampling import Sampling
        from oprd.evaluation.summary import Evaluation
        from oprd.training.tools import rendering
        from oprd.training.turns import TurnsEngine

        asked = [{"prompt": problem["prompt"], "answer": problem["answer"]} for problem in problems(which)]
        args = OPRDConfig(str(OUT / "scoring"), max_completion_length=max_new_tokens, use_cpu=True, report_to="none")
        teacher, data = str(MODELS / "teacher"), Dataset.from_list(asked)
        trainer = OPRDTrainer(str(path), teacher, args, data, tools=[calculator])
        found = draw(
            TurnsEngine(trainer),
            [Problem(problem_id(p["prompt"], p["answer"]), p["prompt"], p["answer"]) for p in asked],
            Sampling(samples=4, temperature=0.7, top_p=1.0, max_new_tokens=max_new_tokens, batch_size=1024),
            template=rendering(trainer.tools, trainer.processing_class),
        )
        summary = Evaluation.of(found).summary()
        values = {name: summary[name]["value"] for name in ("avg_at_k", "best_at_k", "mean_length")}
        return values | {f"avg_{end}": summary["avg_at_k"][end] for end in ("low", "high")}


def supervise_results_too() -> None:
    """A control: tool results count as if the student had written them."""
    from oprd.training import trainer

    supervise = trainer.supervise

    def everything(batch, *args, **kwargs):
        return supervise({name: value for name, value in batch.items() if name != "tool_mask"}, *args, **kwargs)

    trainer.supervise = everything


# OPRD wants about four times the rate of the output losses. The last control runs at OPRD's usual one.
ROWS = {
    "OPRD": Row({}, (2e-3, 4e-3), RECIPE, LENGTH),
    "OPD full KL": Row({**OPD, "output_loss": "full"}, (1e-3, 2e-3), RECIPE, LENGTH),
    "control: OPRD, results supervised too": Row({}, (2e-3, 4e-3), RECIPE, LENGTH, patch=supervise_results_too),
    "control: OPRD, first turn only": Row({"max_tool_calling_iterations": 0}, (4e-3,), RECIPE, LENGTH),
}
TABLE = ToolTable(
    OUT,
    ROWS,
    {"teacher": (str(MODELS / "teacher"), LENGTH), "student, no training": (str(MODELS / "student"), LENGTH)},
    limits=(5e-4, 8e-3),
    steps=50,
    batch=16,
    samples=4,
    recorded=HERE / "recorded" / "tools.jsonl",
)


def one_row(name: str) -> None:
    TABLE.one_row(name)


def build() -> None:
    if not (MODELS / "teacher").exists():
        from tool_task import rebuild

        rebuild(MODELS)


if __name__ == "__main__":
    if "--build" in sys.argv:
        build()
    else:
        main(TABLE, one_row, __doc__, build)
