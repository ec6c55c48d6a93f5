"""Plans of a recipe: as it stands, with the other objectives, and with what would save memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig
from tqdm import tqdm
from transformers import PretrainedConfig
from trl import get_peft_config

from oprd.bridge import Bridge
from oprd.insight.planner import GB, Plan, Setup, plan_setup
from oprd.insight.recipe_models import config_of, teachers_of, weights_of
from oprd.insight.simulate import Shapes
from oprd.models import recorded_layer_map, resolve_path
from oprd.objectives import select_layers
from oprd.training.preflight import check_attention, check_layer_map
from oprd.training.recipe import Configs, parse
from oprd.training.settings import spoken

PROMPT_TOKENS = 512  # where nothing says how long prompts are
OBJECTIVES: dict[str, dict[str, Any]] = {
    "OPRD": {"representation_weight": 1.0, "output_loss": "none", "logit_weight": 0.0},
    "OPRD + head metric": {"representation_weight": 1.0, "output_loss": "none", "logit_weight": 1.0},
    "OPRD + full KL": {"representation_weight": 1.0, "output_loss": "full", "logit_weight": 0.0},
    "sampled token": {"representation_weight": 0.0, "output_loss": "sampled", "logit_weight": 0.0},
    "top-16": {"representation_weight": 0.0, "output_loss": "top_k", "output_top_k": 16, "logit_weight": 0.0},
    "full KL": {"representation_weight": 0.0, "output_loss": "full", "logit_weight": 0.0},
}


def setup_of(
    configs: Configs, *, bf16: bool, prompt_tokens: int | None, processes: int, sharding: str
) -> tuple[Setup, list[str]]:
    """What a recipe runs, and in words what had to be assumed.

    Args:
        bf16: whether the forward runs in bf16 (on the GPU that the plan is for, not here).
        prompt_tokens: of each prompt; ``max_prompt_length`` if None.

    Raises:
        ValueError: models that are missing or cannot be compared.
    """
    _, args, model, fit, _ = configs
    check_attention(args, model.attn_implementation)
    if sharding != "none" and processes == 1:
        raise ValueError(f"--sharding {sharding} splits nothing over one GPU: set --gpus.")
    if args.teacher_url is not None:
        raise ValueError(
            "A plan is of models here: name a teacher of the same shape as teacher_model_name_or_path, without teacher_url. "
            "Its weights and its forward are then in the plan, and not in your run."
        )
    if model.model_name_or_path is None:
        raise ValueError("A plan needs both models: set model_name_or_path and teacher_model_name_or_path.")
    student = config_of("model_name_or_path", model.model_name_or_path, model.model_revision, args.trust_remote_code)
    notes: list[str] = []
    teacher, args, others, readers = teachers_of(args, student, notes)
    own, other = student.get_text_config(), teacher.get_text_config()
    rank = _bridge_rank(args.bridge, fit.bridge_rank, own, other)
    compared = rank is None and args.representation_weight > 0
    depths = own.num_hidden_layers, other.num_hidden_layers
    recorded = None if args.teacher_model_kind is not None else recorded_layer_map(student)
    layer_map = check_layer_map(args.layer_map, recorded, *depths) if compared else None
    same_depth = layer_map is not None or depths[0] == depths[1]
    if compared and not (same_depth and own.hidden_size == other.hidden_size):
        raise ValueError(
            f"The student has {own.num_hidden_layers} layers of width {own.hidden_size}, the teacher {other.num_hidden_layers} of "
            f"width {other.hidden_size}: set bridge, or representation_weight: 0 with output_loss."
        )
    adopted = args.lm_head in ("auto", "teacher") and rank is None and _adoptable(own, other)
    vocab_size = min(own.vocab_size, other.vocab_size)
    if vocab_size / max(own.vocab_size, other.vocab_size) < 0.9 and args.output_loss != "none":
        notes.append("output losses are planned as if both models had the smaller of the two vocabularies")
    objective = args.objective(
        layers=select_layers(args.layers, own.num_hidden_layers),
        num_layers=own.num_hidden_layers,
        vocab_size=vocab_size,
        head_adopted=adopted,
        bridge=None if rank is None else _Through(),
        layer_map=layer_map,
    )
    objective = dataclasses.replace(objective, bridge=None)
    if prompt_tokens is None:
        prompt_tokens = args.max_prompt_length or PROMPT_TOKENS
        if args.max_prompt_length is None:
            notes.append(f"prompts of {PROMPT_TOKENS} tokens (--prompt_tokens, or max_prompt_length in the recipe)")
    longest = prompt_tokens + args.max_completion_length
    rows = _rows(args.max_tokens_per_microbatch, args.per_device_train_batch_size, prompt_tokens, longest)
    if model.load_in_4bit or model.load_in_8bit:
        notes.append("the student's weights as if they were not quantised, which is too much")
    notes.append(f"every response as long as it may be, {args.max_completion_length} tokens")
    dtype = _dtype((args.model_init_kwargs or {}).get("dtype") or model.dtype or "float32", own)
    teacher_dtype = _dtype((args.teacher_model_init_kwargs or {}).get("dtype") or dtype, other)
    half = torch.bfloat16 if bf16 else torch.float16 if args.fp16 else None
    shapes = Shapes(
        student,
        teacher,
        rows,
        positions=args.positions,
        position_k=args.position_k if args.positions in ("first_k", "last_k", "random_k") else None,
        state_at=args.state_at,
        gradient_scope=args.gradient_scope,
        is_packed=args.is_packed,
        dtype=dtype,
        teacher_dtype=teacher_dtype,
        autocast=half if half != dtype else None,
        gradient_checkpointing=args.gradient_checkpointing,
        lm_head="teacher" if adopted else "freeze" if args.lm_head == "freeze" else "keep",
        trainable=args.trainable,
        tile_mlp=args.tile_mlp,
        peft=get_peft_config(model),
        bridge_rank=rank,
        on_gpu=True,
    )
    colocated = args.use_vllm and args.vllm_mode == "colocate"
    served = args.use_vllm and not colocated
    setup = Setup(
        shapes,
        objective,
        optim=getattr(args.optim, "value", args.optim),
        processes=processes,
        sharding=sharding,
        rows_generated=0 if served else args.per_device_train_batch_size * args.gradient_accumulation_steps,
        in_vllm=args.vllm_gpu_memory_utilization if colocated else None,
        vllm_sleeps=args.vllm_enable_sleep_mode,
        offload_teacher=args.offload_teacher,
        teacher_in_8bit=args.teacher_load_in_8bit,
        teacher_is_student=args.teacher_model_kind is not None
        and (args.teacher_model_kind == "live" or model.use_peft),
        other_teachers=weights_of(others, teacher_dtype),
        readers=readers,
    )
    return setup, notes


def _dtype(name: str | torch.dtype, config: PretrainedConfig) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    return config.dtype or torch.float32 if name == "auto" else getattr(torch, name)


class _Through:
    """Says that there is a bridge, to settle what depends on it."""


def _adoptable(own: PretrainedConfig, other: PretrainedConfig) -> bool:
    return not own.tie_word_embeddings and own.hidden_size == other.hidden_size


def _bridge_rank(bridge: str | None, wanted: Any, own: PretrainedConfig, other: PretrainedConfig) -> int | None:
    if bridge is None:
        return None
    if bridge != "auto":
        return Bridge.from_pretrained(resolve_path(bridge)).rank
    full = min(own.hidden_size, other.hidden_size)
    return min(int(wanted), full) if str(wanted).isdigit() else full


def _rows(budget: int | None, batch: int, prompt: int, longest: int) -> tuple[tuple[int, int], ...]:
    """Prompt and response tokens of a micro-batch: as many of the longest responses as there is room for."""
    response = longest - prompt
    if budget is None:
        return ((prompt, response),) * batch
    if budget < longest:
        raise ValueError(
            f"max_tokens_per_microbatch={budget} has no room for a prompt of {prompt} tokens and a response of {response}. Set it "
            f"to {longest} or more, or lower max_completion_length."
        )
    number = min(budget // longest, batch)
    rest = budget - number * longest if number < batch else 0
    return ((prompt, response),) * number + (((prompt, rest - prompt),) if rest > prompt else ())


def _scopes(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """The other gradient scope."""
    other = "full" if setup.shapes.gradient_scope == "suffix" else "suffix"
    yield f"{other} gradient", dataclasses.replace(setup, shapes=_scoped(setup.shapes, other))


def _scoped(shapes: Shapes, scope: str) -> Shapes:
    return dataclasses.replace(shapes, gradient_scope=scope, is_packed=shapes.is_packed or scope == "suffix")


def alternatives(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Every objective in both gradient scopes, on the same rollouts. A bridge limits them to representations."""
    for name, settings in OBJECTIVES.items():
        if setup.shapes.bridge_rank is not None and settings["logit_weight"]:
            continue
        for scope in ("full", "suffix"):
            shapes = _scoped(setup.shapes, scope)
            objective = dataclasses.replace(setup.objective, **settings)
            if not objective.representation_weight:
                shapes = dataclasses.replace(shapes, bridge_rank=None)
            yield f"{name}, {scope} gradient", dataclasses.replace(setup, shapes=shapes, objective=objective)


def remedies(setup: Setup, gpu: float) -> Iterator[tuple[str, Plan]]:
    """What would save memory, one change at a time, and then all that keep the method as it is."""
    shapes, objective = setup.shapes, setup.objective
    longest = max(map(sum, shapes.rows))
    exact: dict[str, dict[str, Any]] = {}
    shape_changes: dict[str, Any] = {}
    if not shapes.gradient_checkpointing:
        shape_changes["gradient_checkpointing: true"] = {"gradient_checkpointing": True}
    if len(shapes.rows) > 1:
        one = {"rows": (max(shapes.rows, key=sum),), "is_packed": True}
        shape_changes[f"max_tokens_per_microbatch: {longest}"] = one
    if not shapes.tile_mlp:
        shape_changes["tile_mlp: true"] = {"tile_mlp": True}
    for text, change in shape_changes.items():
        exact[text] = {"shapes": change}
    if objective.representation_weight and not objective.offload_targets:
        exact["offload_targets: true"] = {"objective": {"offload_targets": True}}
    if not setup.offload_teacher and setup.sharding == "none" and not setup.teacher_in_8bit:
        exact["offload_teacher: true"] = {"offload_teacher": True}
    if "8bit" not in setup.optim:
        exact["optim: adamw_8bit (bitsandbytes)"] = {"optim": "adamw_8bit"}
    if setup.rows_generated and setup.in_vllm is None:
        exact["use_vllm: true, vllm_mode: server (on another GPU)"] = {"rows_generated": 0}
    changing: dict[str, dict[str, Any]] = {}
    if shapes.peft is None and shapes.trainable == "all":
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        changing["use_peft: true (LoRA, r = 16, all linear maps)"] = {"shapes": {"peft": adapter}}
    if shapes.gradient_scope == "full" and objective.uses_states and not objective.uses_output:
        k = shapes.position_k or max(1, min(2000, max(response for _, response in shapes.rows) // 4))
        suffix = {"gradient_scope": "suffix", "is_packed": True, "positions": "last_k", "position_k": k}
        changing[f"gradient_scope: suffix, positions: last_k, position_k: {k}"] = {"shapes": suffix}
    if setup.sharding != "fsdp":
        changing["the student under FSDP2 on 8 GPUs"] = {"sharding": "fsdp", "processes": 8, "offload_teacher": False}
    for text, change in (exact | changing).items():
        if (changed := _possible(_changed(setup, change), gpu)) is not None:
            yield text, changed
    together = setup
    for change in exact.values():
        together = _changed(together, change)
    if len(exact) > 1 and (changed := _possible(together, gpu)) is not None:
        kept = "without " + ", ".join(text.split(":")[0].split(" (")[0] for text in changing) if changing else ""
        yield f"all of these together, {kept}".rstrip(", "), changed


def _possible(setup: Setup, gpu: float) -> Plan | None:
    """The plan, or None for models that cannot run this way (packed, say)."""
    try:
        return plan_setup(setup, gpu)
    except ValueError:
        return None


def _changed(setup: Setup, change: dict[str, Any]) -> Setup:
    nested = {
        name: dataclasses.replace(getattr(setup, name), **change[name])
        for name in ("shapes", "objective")
        if name in change
    }
    return dataclasses.replace(setup, **(change | nested))


@dataclasses.dataclass(frozen=True)
class RecipePlan:
    """Rows of the table (the recipe first), what would help if it does not fit, and what was assumed."""

    plan: Plan
    rows: list[dict[str, Any]]
    remedies: list[dict[str, Any]]
    notes: list[str]

    @property
    def verdict(self) -> str:
        return verdict(self.plan)


def plan_recipe(
    arguments: list[str],
    *,
    gpu_memory: float | None = None,
    processes: int = 1,
    sharding: str = "none",
    prompt_tokens: int | None = None,
    every: bool = False,
) -> RecipePlan:
    """From the arguments of ``oprd train`` to a plan on a GPU of ``gpu_memory`` GB (this machine's, or 80).

    Beside the recipe its objective in the other gradient scope is planned; with ``every`` all objectives in both.

    Raises:
        ValueError: whatever is wrong with the recipe, as far as it can be known without the data.
    """
    said = spoken(arguments)
    configs = parse([*arguments, "--use_cpu", "true"], "plan")
    for_cpu = said.get("use_cpu") is True
    bf16 = said["bf16"] if said.get("bf16") is not None else not (for_cpu or configs.args.fp16)
    setup, notes = setup_of(
        configs, bf16=bool(bf16), prompt_tokens=prompt_tokens, processes=processes, sharding=sharding
    )
    if gpu_memory is None:
        found = torch.cuda.is_available()
        gpu_memory = torch.cuda.get_device_properties(0).total_memory / GB if found else 80.0
        notes.append(f"a GPU of {gpu_memory:.0f} GB (--gpu_memory)" + ("" if found else "; this machine has none"))
    gpu = gpu_memory * GB
    others = dict(alternatives(setup) if every else _scopes(setup))
    rows, own = [], plan_setup(setup, gpu)
    if own.room <= 0:
        raise ValueError(f"--gpu_memory {gpu_memory:g}: the driver and the allocator's losses alone take 1 GB and 5 %.")
    for name, other in tqdm({"this recipe": setup, **others}.items(), desc="planning", leave=False):
        found_plan = own if other is setup else _possible(other, gpu)
        rows.append({"objective": name, **({"fits": "cannot run"} if found_plan is None else found_plan.row)})
    helps = []
    if not own.fits:
        plans = sorted(remedies(setup, gpu), key=lambda found: found[1].peak)
        helps = [
            {
                "change": text,
                "peak GB": p.row["peak GB"],
                "saves": round((own.peak - p.peak) / GB, 2),
                "fits": p.row["fits"],
            }
            for text, p in plans
            if p.peak < 0.995 * own.peak
        ]
    return RecipePlan(own, rows, helps, notes)


def verdict(plan: Plan) -> str:
    """One line: does it fit."""
    spare = (plan.room - plan.peak) / GB
    setup = plan.setup
    how = "" if setup.sharding == "none" else f", {setup.sharding}"
    on = "on a GPU" if setup.processes == 1 else f"on each of {setup.processes} GPUs{how},"
    size = f"{plan.peak / GB:.1f} GB at the peak, {on} of {plan.gpu / GB:g} GB with {plan.room / GB:.1f} to use"
    return f"{'fits' if plan.fits else 'does not fit'}: {size} ({abs(spare):.1f} {'to spare' if spare >= 0 else 'too many'})"
