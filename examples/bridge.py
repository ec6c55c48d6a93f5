# %% [markdown]
# # A teacher of another origin, depth and width
#
#     python examples/bridge.py                         # the embedded miniature, under two minutes on a CPU
#     python examples/bridge.py --max_steps 10
#
# Hidden states of two models that were trained apart mean different things. A bridge is a pair of linear maps a layer into
# one small space, fitted in closed form on the student's own answers. Training through it moves the student's states; the
# LM head is then solved for, and full KL does the rest (docs/results.md says why in this order).

# %%
import argparse
import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd import Bridge, OPRDConfig, OPRDTrainer
from oprd.evaluation.evaluate import evaluate
from oprd.models import resolve_path
from oprd.training.bridging import BridgeConfig, RolloutTrainer, fit_bridge, rollout_settings
from oprd.training.solved_head import solve_head

parser = argparse.ArgumentParser(description="Distil a teacher of another origin and shape through a bridge.")
parser.add_argument("--max_steps", type=int, default=60, help="updates of each of the two stages")
parser.add_argument(
    "--bridge_prompts", type=int, default=256, help="prompts that the bridge and the head are fitted on"
)
parser.add_argument("--problems", type=int, default=128, help="test problems that models are scored on")
parser.add_argument("--output_dir", default="runs/examples/bridge")
options, _ = parser.parse_known_args()  # a notebook has arguments of its own
folder = Path(options.output_dir)

# %% [markdown]
# ## Models and prompts
#
# For real models: any two causal LMs whose tokenizers are one, such as `Qwen/Qwen3-1.7B-Base` and `Qwen/Qwen3-4B`. (With
# another tokenizer, skip the bridge and set `output_loss="top_k"`.) The head can be solved where the student does not tie it
# to its embeddings; a student that does is best taught with `output_loss="full"` alone.

# %%
STUDENT, TEACHER = "miniature:student", "miniature:wide-teacher"  # 4 layers x 64; 6 layers x 96, from another seed


def problems(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(resolve_path(f"miniature:{name}.jsonl")).read_text().splitlines()]


def accuracy(path: str | Path) -> float:
    """Avg@4 in percent on problems that nobody trained on."""
    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    scores = evaluate(
        model, tokenizer, problems("test")[: options.problems], samples=4, top_p=1.0, max_new_tokens=44, batch_size=512
    )
    return scores.summary()["avg_at_k"]["value"]


print(f"teacher {accuracy(resolve_path(TEACHER)):.1f} %, student before {accuracy(resolve_path(STUDENT)):.1f} %")


def settings(stage: str, **more) -> OPRDConfig:
    return OPRDConfig(
        output_dir=str(folder / stage),
        max_steps=options.max_steps,
        learning_rate=1e-3,  # real models: 1e-5, the default
        per_device_train_batch_size=32,  # real models: 1 or 2, and gradient_accumulation_steps for the rest
        responses_per_prompt=2,
        max_completion_length=44,  # real models: what their answers need, 2048 or more
        weight_decay=0.0,
        # A CPU and no trackers.
        use_cpu=True,
        gradient_checkpointing=False,
        cache_implementation="static",
        save_strategy="no",
        report_to="none",
        logging_steps=20,
        disable_tqdm=True,
        **more,
    )


train_dataset = Dataset.from_list(problems("train"))

# %% [markdown]
# ## The bridge
#
# One pass over the student's answers. Look at its report before you train: R^2 says how much of the teacher the student's
# states can tell, and the controls what a random teacher would have scored. `oprd bridge fit` does the same from a recipe.

# %%
first = settings("states", lm_head="solved", representation_loss="normalized_mse")
how = BridgeConfig(bridge_rank="full", bridge_prompts=options.bridge_prompts)  # real models: 2000 prompts
bridge: Bridge = fit_bridge(
    lambda: RolloutTrainer(STUDENT, TEACHER, rollout_settings(first), train_dataset), how, folder / "bridge"
)
controls = bridge.report["controls"]
print(
    f"{bridge}: held-out R2 {controls['bridge']['explained']:.2f}, random teacher {controls['random_teacher']['explained']:.2f}"
)

# %% [markdown]
# ## First stage: states, then the head
#
# Under its own head the student gets worse here, however close its states come; `solve_head` gives it a head that reads them.

# %%
trainer = OPRDTrainer(STUDENT, TEACHER, first, train_dataset, bridge=bridge)
trainer.train()
solve_head(trainer, prompts=options.bridge_prompts)
trainer.save_model(str(folder / "states" / "final"))
print(f"after the bridge and a solved head: {accuracy(folder / 'states' / 'final'):.1f} %")

# %% [markdown]
# ## Second stage: full KL
#
# From a YAML recipe both stages are one run (`oprd train --config miniature-bridge`).

# %%
second = settings("output", representation_weight=0, lm_head="keep", output_loss="full")
trainer = OPRDTrainer(str(folder / "states" / "final"), TEACHER, second, train_dataset)
trainer.train()
trainer.save_model(str(folder / "final"))
print(f"student after 2 x {options.max_steps} updates: {accuracy(folder / 'final'):.1f} %, saved in {folder / 'final'}")
