"""Teachers of another origin, shape or tokenizer (docs/results.md): bridges, prefix marginals, their controls.

    python benchmarks/bridge_table.py                  # run what is missing, then print both tables
    python benchmarks/bridge_table.py --only "KL"      # rows by name
    python benchmarks/bridge_table.py --print

The first table's student (4 x 64) is taught by a deeper and wider teacher (6 x 96) that was trained from another seed; the
second's writes digit by digit and its teacher reads two-digit numbers as one token. One budget for all: 200 updates of 16
prompts x 2 responses. A row of two stages splits it in halves. See benchmarks/sweeping.py for how rows are swept and scored.
"""

from __future__ import annotations

from pathlib import Path

from sweeping import Key, Row, Table, flags, main, one_run

OUT = Path("runs/bridge")
FITTED, RANDOM_TEACHER = OUT / "fitted", OUT / "random-teacher"
RATES = (5e-4, 1e-3)
WIDE = {"teacher_model_name_or_path": "miniature:wide-teacher", "lm_head": "keep"}
OUTPUT = {"representation_weight": 0, "logit_weight": 0}
RANKS = ("8", "1", "2", "4", "16", "32", "full", "auto")


def bridge(name: str, weight: float = 1.0) -> dict:
    return {"bridge": FITTED / name, "representation_weight": weight, "representation_loss": "normalized_mse"}


def two_stages(second: dict):
    """Half of the budget through the bridge, half of it as ``second`` says."""

    def run(key: Key, directory: Path, arguments: dict) -> Path:
        half = arguments["max_steps"] // 2
        first = one_run(key, directory / "first", {**arguments, "max_steps": half, "learning_rate": 1e-3})
        rest = {k: v for k, v in arguments.items() if k not in bridge("")}
        return one_run(key, directory, {**rest, **OUTPUT, **second, "max_steps": half, "model_name_or_path": first})

    return run


def with_closed_form_head(first: str | Path, directory: Path, arguments: dict) -> Path:
    """The model at ``first`` under the head W_T C_TS C_SS^-1, from a pass over fresh rollouts of its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from oprd.models import resolve_path
    from oprd.training.bridging import collect
    from oprd.training.recipe import parse
    from oprd.training.run import _bridge_trainer, load_data

    directory.mkdir(parents=True, exist_ok=True)
    arguments = {**arguments, "model_name_or_path": first, "output_dir": directory, "bridge_prompts": 512}
    configs = parse(flags(arguments))
    collection, _ = collect(_bridge_trainer(load_data(configs), configs[1], configs[2]), configs[3], directory)
    moments = collection.fitter.train[-1]
    first = resolve_path(str(first))
    student = AutoModelForCausalLM.from_pretrained(first, use_safetensors=True)
    other = resolve_path(arguments["teacher_model_name_or_path"])
    teacher = AutoModelForCausalLM.from_pretrained(other, use_safetensors=True)
    linear = torch.linalg.solve(moments.student_student, moments.student_teacher).T  # h_T ~ linear h_S
    with torch.no_grad():
        student.lm_head.weight.copy_(teacher.lm_head.weight.double() @ linear)
    student.save_pretrained(directory / "final")
    AutoTokenizer.from_pretrained(first).save_pretrained(directory / "final")
    return directory / "final"


def head_at_the_start(key: Key, directory: Path, arguments: dict) -> Path:
    """No training at all."""
    return with_closed_form_head("miniature:student", directory, arguments)


def head_at_the_end(key: Key, directory: Path, arguments: dict) -> Path:
    """The whole budget through the bridge, then the head."""
    return with_closed_form_head(one_run(key, directory / "first", arguments), directory, arguments)


def head_in_the_middle(key: Key, directory: Path, arguments: dict) -> Path:
    """Half of the budget through the bridge, the head, then full KL."""
    half = arguments["max_steps"] // 2
    first = one_run(key, directory / "first", {**arguments, "max_steps": half, "learning_rate": 1e-3})
    second = with_closed_form_head(first, directory / "second", arguments)
    rest = {k: v for k, v in arguments.items() if k not in bridge("")}
    return one_run(
        key, directory, {**rest, **OUTPUT, "output_loss": "full", "max_steps": half, "model_name_or_path": second}
    )


def head_then_kl(key: Key, directory: Path, arguments: dict) -> Path:
    """The head without any training through a bridge, then the whole budget of full KL."""
    second = with_closed_form_head("miniature:student", directory / "second", arguments)
    rest = {k: v for k, v in arguments.items() if k not in bridge("")}
    return one_run(key, directory, {**rest, **OUTPUT, "output_loss": "full", "model_name_or_path": second})


def refitted(key: Key, directory: Path, arguments: dict) -> Path:
    """Four quarters of the budget, with a bridge fitted anew before each."""
    quarter, path = arguments["max_steps"] // 4, None
    for place in range(4):
        again = {} if path is None else {"model_name_or_path": path}
        settings = {"bridge": "auto", "bridge_prompts": 512, "bridge_rank": "full", "max_steps": quarter, **again}
        path = one_run(key, directory / f"quarter-{place}", {**arguments, **settings})
    return path


ORIGIN_ROWS = {
    "OPD full KL": Row({**WIDE, **OUTPUT, "output_loss": "full"}, RATES),
    "OPD sampled token": Row({**WIDE, **OUTPUT, "output_loss": "sampled"}, RATES),
    "bridge, rank 8": Row({**WIDE, **bridge("wide-8")}, RATES),
    "head metric alone": Row({**WIDE, "representation_weight": 0, "logit_weight": 1}, (1e-3, 2e-3)),
    "full KL + head metric": Row(
        {**WIDE, "representation_weight": 0, "logit_weight": 1, "output_loss": "full"}, (1e-3,)
    ),
    "full KL + 0.1 x bridge, full rank": Row({**WIDE, **bridge("wide-full", 0.1), "output_loss": "full"}, RATES),
    "bridge rank 8, then OPD sampled token": Row(
        {**WIDE, **bridge("wide-8")}, (5e-4,), run=two_stages({"output_loss": "sampled"})
    ),
    "bridge rank 8, then the head alone (full KL)": Row(
        {**WIDE, **bridge("wide-8")}, (1e-3,), run=two_stages({"output_loss": "full", "trainable": "head"})
    ),
    "bridge full rank, then OPD full KL": Row(
        {**WIDE, **bridge("wide-full")}, (1e-3,), run=two_stages({"output_loss": "full"})
    ),
    **{f"bridge, rank {rank}": Row({**WIDE, **bridge(f"wide-{rank}")}, (1e-3,)) for rank in RANKS[1:]},
    "bridge full rank, closed-form head at the end": Row(
        {**WIDE, **bridge("wide-full")}, (1e-3, 2e-3), run=head_at_the_end
    ),
    "bridge full rank, closed-form head, full KL": Row(
        {**WIDE, **bridge("wide-full")}, (1e-3,), run=head_in_the_middle
    ),
    "control: OPD full KL, 300 updates": Row({**WIDE, **OUTPUT, "output_loss": "full", "max_steps": 300}, (1e-3,)),
    "control: closed-form head, then full KL": Row({**WIDE, **bridge("wide-full")}, (1e-3,), run=head_then_kl),
    "control: closed-form head, no training": Row({**WIDE, **bridge("wide-full")}, (1e-3,), run=head_at_the_start),
    "bridge full rank, refitted three times": Row({**WIDE, **bridge("wide-full")}, (1e-3,), run=refitted),
    "full KL + 1 x bridge, full rank": Row({**WIDE, **bridge("wide-full", 1.0), "output_loss": "full"}, (1e-3,)),
    "OPD top-16": Row({**WIDE, **OUTPUT, "output_loss": "top_k"}, RATES),
    "the head alone (full KL)": Row({**WIDE, **OUTPUT, "output_loss": "full", "trainable": "head"}, (1e-3,)),
    "control: random bridge, rank 8": Row({**WIDE, **bridge("wide-random")}, (1e-3,)),
    "control: random teacher, full KL": Row(
        {**WIDE, "teacher_model_name_or_path": RANDOM_TEACHER, **OUTPUT, "output_loss": "full"}, (1e-3,)
    ),
}
TOKENIZER = {"recipe": "miniature-tokenizer", "max_new_tokens": 56}


def by_index() -> None:
    """Pair the i-th student token with the i-th teacher token, as published code does."""
    from oprd.states import crossing

    honest = crossing.Crossing.read

    def read(self, ids):
        found = honest(self, ids)
        found.partner = [i if i <= len(found.teacher_ids) else -1 for i in range(len(found.partner))]
        return found

    crossing.Crossing.read = read


def boundaries_only() -> None:
    """Supervise the positions where both tokenizers have a boundary, and no others."""
    from oprd.states import views

    honest = views.make_rollout

    def at_boundaries(*args, output_weights_BC, teacher_text, **kwargs):
        weights = output_weights_BC * (teacher_text.before_BC >= 0)
        return honest(*args, output_weights_BC=weights, teacher_text=teacher_text, **kwargs)

    from oprd.training import trainer

    trainer.make_rollout = at_boundaries


TOKENIZER_ROWS = {
    "prefix marginals, full KL": Row(OUTPUT | {"output_loss": "full"}, RATES, **TOKENIZER),
    "prefix marginals, top-16": Row(OUTPUT | {"output_loss": "top_k"}, (5e-4,), **TOKENIZER),
    "prefix marginals, sampled token": Row(OUTPUT | {"output_loss": "sampled"}, RATES, **TOKENIZER),
    "bridge auto rank, aligned on bytes": Row(bridge("digit-auto") | {"output_loss": "none"}, RATES, **TOKENIZER),
    "bridge rank 4, aligned on bytes": Row(bridge("digit-4") | {"output_loss": "none"}, (1e-3,), **TOKENIZER),
    "bridge auto rank, aligned by index": Row(
        bridge("index-auto") | {"output_loss": "none"}, (1e-3,), patch=by_index, **TOKENIZER
    ),
    "prefix marginals + 0.1 x bridge, full rank": Row(
        bridge("digit-full", 0.1) | {"output_loss": "full"}, (5e-4,), **TOKENIZER
    ),
    "prefix marginals + 1 x bridge, full rank": Row(
        bridge("digit-full") | {"output_loss": "full"}, (5e-4,), **TOKENIZER
    ),
    "prefix marginals at common boundaries only": Row(
        OUTPUT | {"output_loss": "full"}, (5e-4,), patch=boundaries_only, **TOKENIZER
    ),
    "control: random bridge, rank 8": Row(bridge("digit-random") | {"output_loss": "none"}, (1e-3,), **TOKENIZER),
    "control: random teacher, prefix marginals": Row(
        OUTPUT | {"output_loss": "full", "teacher_model_name_or_path": RANDOM_TEACHER}, (1e-3,), **TOKENIZER
    ),
}
LIMITS = (2.5e-4, 4e-3)
ORIGIN = Table(
    OUT / "origin",
    ORIGIN_ROWS,
    {"teacher": ("miniature:wide-teacher", 44), "student": ("miniature:student", 44)},
    LIMITS,
    recorded=Path(__file__).parent / "recorded" / "bridge-origin.jsonl",
)
TOKENS = Table(
    OUT / "tokenizer",
    TOKENIZER_ROWS,
    {"teacher": ("miniature:teacher", 44), "student": ("miniature:digit-student", 56)},
    LIMITS,
    recorded=Path(__file__).parent / "recorded" / "bridge-tokenizer.jsonl",
)


def origin_row(name: str) -> None:
    ORIGIN.one_row(name)


def token_row(name: str) -> None:
    TOKENS.one_row(name)


def fit_bridges() -> None:
    """One fit per pair and alignment; every rank is a slice of it."""
    import multiprocessing

    from oprd.bridge import Bridge

    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        pool.map(_fit, ("wide", "digit", "index"))
    for pair in ("wide", "digit"):
        made = OUT / "fitted" / f"{pair}-random"
        if not made.exists():
            random_bridge(Bridge.from_pretrained(FITTED / f"{pair}-8")).save_pretrained(made)
    if not RANDOM_TEACHER.exists():
        from oprd.miniature.rebuild import build_model
        from oprd.miniature.task import build_tokenizer

        tokenizer = build_tokenizer()
        build_model(tokenizer, seed=123).save_pretrained(RANDOM_TEACHER)
        tokenizer.save_pretrained(RANDOM_TEACHER)


def _fit(pair: str) -> None:
    from oprd.training.run import fit

    if (FITTED / f"{pair}-auto").exists():
        return
    if pair == "index":
        by_index()
    recipe = "miniature-bridge" if pair == "wide" else "miniature-tokenizer"
    settings = {"config": recipe, "bridge": FITTED / f"{pair}-full", "bridge_rank": "full", "bridge_prompts": 2000}
    _, full, _ = fit(flags({**settings, "representation_weight": 1, "disable_tqdm": "true", "output_dir": OUT / "fit"}))
    for rank in ("1", "2", "4", "8", "16", "32", "auto"):
        chosen = full.report["rank"]["theorem"] if rank == "auto" else int(rank)
        full.truncate(chosen).save_pretrained(FITTED / f"{pair}-{rank}")


def random_bridge(fitted):
    """The fitted one with its student side replaced by random maps of the same size."""
    import torch

    from oprd.bridge import Bridge

    generator = torch.Generator().manual_seed(0)
    parts = dict(fitted._tensors)
    maps = torch.randn(parts["student_map"].shape, generator=generator)
    parts["student_map"] = maps * parts["student_map"].norm(dim=-1, keepdim=True) / maps.norm(dim=-1, keepdim=True)
    return Bridge(
        fitted.layer_map, parts["student_map"], parts["student_mean"], parts["teacher_map"], parts["teacher_mean"]
    )


if __name__ == "__main__":
    print("## Another origin and shape\n")
    main(ORIGIN, origin_row, __doc__, fit_bridges)
    print("\n## Another tokenizer\n")
    main(TOKENS, token_row, __doc__)
