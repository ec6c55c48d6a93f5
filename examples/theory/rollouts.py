"""Shared by the scripts of this folder: text that the miniature's student wrote, and what models make of it.

Shapes: B answers, C answer columns, N supervised positions, L layers, d width, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from oprd.evaluation.sampling import Sampling, TransformersEngine
from oprd.insight.tables import format_table
from oprd.models import head_of, resolve_path, text_config
from oprd.objectives import position_weights
from oprd.states import Rollout, make_rollout, visit_states


def load(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model that ships with the package, such as ``student``."""
    model = AutoModelForCausalLM.from_pretrained(resolve_path(f"miniature:{name}"), dtype=dtype, use_safetensors=True)
    return model.eval()


def tokenizer(name: str = "student") -> PreTrainedTokenizerBase:
    """A model's; the student and its teachers share one."""
    return AutoTokenizer.from_pretrained(resolve_path(f"miniature:{name}"))


def training_prompts(tok: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the 4,096 training prompts."""
    lines = Path(resolve_path("miniature:train.jsonl")).read_text(encoding="utf-8").splitlines()
    return tok([json.loads(line)["prompt"] for line in lines])["input_ids"]


def _padded(rows: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])


def write(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, prompts: list[list[int]], seed: int, length: int = 44
) -> Rollout:
    """One answer to each prompt, drawn at temperature 1; every answer token is supervised (Eq. 6's weights)."""
    sampling = Sampling(1, temperature=1.0, top_p=1.0, max_new_tokens=length)
    answers = TransformersEngine(model, tok).write(prompts, sampling, seed)
    (prompt_ids, prompt_mask), (ids, mask) = (_padded(rows, tok.pad_token_id) for rows in (prompts, answers))
    weights_BC = position_weights(mask)
    return make_rollout(prompt_ids, prompt_mask, ids, mask, state_weights_BC=weights_BC, output_weights_BC=weights_BC)


def states(model: PreTrainedModel, rollout: Rollout, layers: Sequence[int] | None = None) -> list[Tensor]:
    """States at the supervised positions, ``[N, d]`` for each layer (all by default); the last is after the final norm."""
    layers = layers or range(1, text_config(model).num_hidden_layers + 1)
    pairs = rollout.state_pairs
    _, found = visit_states(
        model, rollout.student, sorted(set(layers)), lambda _, states_BSd: pairs.of_student(states_BSd)
    )
    return [found[layer] for layer in layers]


def logits(model: PreTrainedModel, last_Nd: Tensor) -> Tensor:
    """``[N, d] -> [N, V]`` through the model's own head."""
    return head_of(model).logits(last_Nd)


# ------------------------------------------------------------------------------------------------------------ output


def arguments(description: str) -> argparse.Namespace:
    """``--out`` and ``--quick``."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/theory"), help="folder of the PNG and the JSON file")
    parser.add_argument("--quick", action="store_true", help="a few seconds, for tests: numbers mean little")
    return parser.parse_args()


def show(title: str, rows: list[dict]) -> None:
    """A table under its title."""
    print(f"\n{title}\n\n{format_table(rows)}", flush=True)


def new_figure(panels: int):
    """A figure and its axes, side by side, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.1 * panels, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.grid(alpha=0.25, linewidth=0.6)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def keep(out: Path, name: str, numbers: dict, figure) -> None:
    """``out/theory-NAME.png`` and ``out/theory-NAME.json``."""
    out.mkdir(parents=True, exist_ok=True)
    for one in figure.axes:
        if one.get_legend_handles_labels()[0]:
            one.legend(frameon=False, fontsize=7.5)
    figure.savefig(out / f"theory-{name}.png", dpi=80, pil_kwargs={"optimize": True})
    (out / f"theory-{name}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(f"\n{out / f'theory-{name}.png'} and .json", flush=True)
