# %% [markdown]
# # A teacher that was trained on from the student
#
#     python examples/same_family.py                    # the embedded miniature, about a minute on a CPU
#     python examples/same_family.py --max_steps 20
#
# The student writes answers, both models read them, and the student's hidden states are pulled towards the teacher's at
# every layer. The cells can be run one by one in any editor that knows `# %%`.

# %%
import argparse
import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd import OPRDConfig, OPRDTrainer
from oprd.evaluation.evaluate import evaluate
from oprd.models import resolve_path

parser = argparse.ArgumentParser(description="Distil a teacher of the student's own family.")
parser.add_argument("--max_steps", type=int, default=100, help="updates")
parser.add_argument("--problems", type=int, default=128, help="test problems that models are scored on")
parser.add_argument("--output_dir", default="runs/examples/same_family")
options, _ = parser.parse_known_args()  # a notebook has arguments of its own

# %% [markdown]
# ## Models and prompts
#
# For real models give Hub ids or folders, such as `Qwen/Qwen2.5-1.5B-Instruct` and what was trained from it. Student and
# teacher need one origin and one shape: only then do their hidden states mean the same.
#
# Prompts are text or chat messages in a column `prompt`. With a column `answer` the rollouts are graded as they are made.

# %%
STUDENT, TEACHER = "miniature:student", "miniature:teacher"


def problems(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(resolve_path(f"miniature:{name}.jsonl")).read_text().splitlines()]


def accuracy(path: str) -> float:
    """Avg@4 in percent on problems that nobody trained on."""
    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    # Real benchmarks: samples=16 and top_p=0.95, and `oprd eval` on the command line does it with vLLM.
    scores = evaluate(
        model, tokenizer, problems("test")[: options.problems], samples=4, top_p=1.0, max_new_tokens=44, batch_size=512
    )
    return scores.summary()["avg_at_k"]["value"]


print(f"teacher {accuracy(resolve_path(TEACHER)):.1f} %, student before {accuracy(resolve_path(STUDENT)):.1f} %")

# %% [markdown]
# ## Train
#
# `OPRDConfig` has every key of TRL's `DistillationConfig` and of transformers' `TrainingArguments`. The first block is what
# you will change for real models; the second is what makes a CPU run quiet.

# %%
config = OPRDConfig(
    output_dir=options.output_dir,
    max_steps=options.max_steps,
    learning_rate=2e-3,  # real models: 1e-5, the default
    per_device_train_batch_size=32,  # real models: 1 or 2, and gradient_accumulation_steps for the rest
    responses_per_prompt=2,
    max_completion_length=44,  # real models: what their answers need, 2048 or more
    layers="all",
    lm_head="auto",  # start from the teacher's head where it fits: the states will be the ones it reads
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
trainer = OPRDTrainer(
    model=STUDENT, teacher_model=TEACHER, args=config, train_dataset=Dataset.from_list(problems("train"))
)
trainer.train()

# %% [markdown]
# ## Keep and score
#
# What is saved is a plain model folder. `accuracy` in the log above is of the training rollouts, at temperature 1.

# %%
final = str(Path(options.output_dir) / "final")
trainer.save_model(final)  # the tokenizer goes along
print(f"student after {options.max_steps} updates: {accuracy(final):.1f} %, saved in {final}")
