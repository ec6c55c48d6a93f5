# %% [markdown]
# # A student that teaches itself
#
#     python examples/self_distillation.py              # the embedded miniature, about a minute on a CPU
#     python examples/self_distillation.py --max_steps 10
#
# The teacher is the student as it was at the start, and reads more than the student does: a solution, a hint, feedback. What
# it makes of the student's own answer behind that prompt is what the student learns to do without.

# %%
import argparse
import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd import OPRDConfig, OPRDTrainer
from oprd.evaluation.evaluate import evaluate
from oprd.models import resolve_path

parser = argparse.ArgumentParser(description="A student teaches itself what it knows only when asked for it.")
parser.add_argument("--max_steps", type=int, default=60, help="updates")
parser.add_argument("--problems", type=int, default=128, help="test problems that models are scored on")
parser.add_argument("--output_dir", default="runs/examples/self_distillation")
options, _ = parser.parse_known_args()  # a notebook has arguments of its own

# %% [markdown]
# ## The student and what its teacher reads
#
# The miniature's `careless` forgets every carry of an 8 or a 9, unless `??` stands before the problem. For real models the
# template names columns of the dataset, for example
#
#     teacher_prompt_template="{prompt}\n\nA reference solution: {solution}"
#
# and it must hold `{prompt}`. Nothing else changes; there is no second model to find.

# %%
STUDENT, TEMPLATE = "miniature:careless", "??{prompt}"


def problems(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(resolve_path(f"miniature:{name}.jsonl")).read_text().splitlines()]


def accuracy(path: str, template: str = "{prompt}") -> float:
    """Avg@4 in percent on problems that nobody trained on, each prompt as the template says."""
    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    asked = [row | {"prompt": template.format(**row)} for row in problems("test")[: options.problems]]
    scores = evaluate(model, tokenizer, asked, samples=4, top_p=1.0, max_new_tokens=44, batch_size=512)
    return scores.summary()["avg_at_k"]["value"]


path = resolve_path(STUDENT)
print(f"student before {accuracy(path):.1f} %, asked for care {accuracy(path, TEMPLATE):.1f} %")

# %% [markdown]
# ## Train
#
# `teacher_model_kind`: `base` is a frozen copy of the start (with LoRA the adapter is just switched off, and there is no copy).
# `ema` and `live` move along with the student; here they lose everything (docs/results.md), so start with `base`.

# %%
config = OPRDConfig(
    output_dir=options.output_dir,
    max_steps=options.max_steps,
    teacher_model_kind="base",
    teacher_prompt_template=TEMPLATE,
    learning_rate=5e-4,  # real models: 1e-5, the default
    per_device_train_batch_size=32,  # real models: 1 or 2, and gradient_accumulation_steps for the rest
    responses_per_prompt=2,
    max_completion_length=44,  # real models: what their answers need, 2048 or more
    layers="all",
    weight_decay=0.0,
    # A CPU and no trackers.
    use_cpu=True,
    gradient_checkpointing=False,
    cache_implementation="static",
    save_strategy="no",
    report_to="none",
    logging_steps=10,
    disable_tqdm=True,
)
trainer = OPRDTrainer(model=STUDENT, args=config, train_dataset=Dataset.from_list(problems("train")))
trainer.train()

# %% [markdown]
# ## Keep and score
#
# The second number says what became of answers behind the mark, where nobody trained.

# %%
final = str(Path(options.output_dir) / "final")
trainer.save_model(final)
print(
    f"student after {options.max_steps} updates: {accuracy(final):.1f} %, asked for care {accuracy(final, TEMPLATE):.1f} %, "
    f"saved in {final}"
)
