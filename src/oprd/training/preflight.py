"""Everything that can be known to be wrong before weights are loaded or a token is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from oprd.bridge import Bridge
from oprd.models import apply_template, recorded_layer_map
from oprd.objectives import select_layers

logger = get_logger(__name__)

NEEDS_BRIDGE = (
    "Their hidden states can be compared through a bridge only, a linear map fitted for the two: oprd bridge fit --config "
    "RECIPE, then bridge: DIR (or bridge: auto for both at once). Or distil without states: representation_weight: 0 with "
    "output_loss: top_k."
)
WHOLE_VOCABULARY = 512  # tokens up to which output_loss: full is affordable across tokenizers

SAME, OTHER_PROMPT, OTHER_TOKENS = "same", "other prompt", "other tokens"


@dataclass(frozen=True)
class Shapes:
    """What the two configs settle: the student's layers that are compared, its depth and vocabulary, the teacher's
    vocabulary where it is another, the shorter of the two contexts, the teacher's own, and the teacher's layer of each student
    layer where that is not the one of its number."""

    layers: list[int]
    num_layers: int
    vocab_size: int
    context: int | None
    teacher_vocab_size: int | None = None
    teacher_context: int | None = None
    layer_map: tuple[int, ...] | None = None


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that its ids take; ids may have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def check_embeddings(role: str, config: PretrainedConfig, size: int) -> None:
    """There is an embedding for every token.

    Raises:
        ValueError: a model with fewer than its tokenizer's ``size``.
    """
    if config.vocab_size < size:
        raise ValueError(
            f"The {role} has {config.vocab_size} embeddings for a tokenizer whose ids go up to {size - 1}. "
            f"Resize it with model.resize_token_embeddings({size}), or use the tokenizer that it was trained with."
        )


def check_models(
    student: PretrainedConfig,
    teacher: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    layers: str | list[int],
    compares_states: bool,
    other_tokenizer: PreTrainedTokenizerBase | None = None,
    bridge: Bridge | None = None,
    layer_map: Sequence[int] | None = None,
    teaches_itself: bool = False,
) -> Shapes:
    """Width, depth and vocabulary.

    Padded vocabularies (151,936 against 152,064 rows for one tokenizer) are cut to the tokenizer's length.

    Args:
        other_tokenizer: the teacher's, where it has another vocabulary.
        bridge: what states are compared through.
        layer_map: the teacher's layer of each student layer, as the user has it; else what a pruned student records.
        teaches_itself: the teacher is the student, whatever that was pruned from.

    Raises:
        ValueError: shapes that cannot be compared, a bridge or a layer map for other shapes, or a model with fewer embeddings than its
            tokenizer has tokens.
    """
    student, teacher = student.get_text_config(), teacher.get_text_config()
    vocab_size = vocabulary_size(tokenizer)
    other_size = None if other_tokenizer is None else vocabulary_size(other_tokenizer)
    for role, config, size in (("student", student, vocab_size), ("teacher", teacher, other_size or vocab_size)):
        check_embeddings(role, config, size)
    depths, widths = (
        [getattr(config, name) for config in (student, teacher)] for name in ("num_hidden_layers", "hidden_size")
    )
    mapped = None
    if bridge is not None:
        _check_bridge_shapes(bridge, depths, widths)
    elif compares_states:
        mapped = check_layer_map(layer_map, None if teaches_itself else recorded_layer_map(student), *depths)
    if compares_states and bridge is None and ((mapped is None and depths[0] != depths[1]) or widths[0] != widths[1]):
        raise ValueError(
            f"The student has {depths[0]} layers of width {widths[0]}, the teacher {depths[1]} of width {widths[1]}. "
            + NEEDS_BRIDGE
        )
    elif compares_states and bridge is None and other_tokenizer is not None:
        raise ValueError(
            f"Student and teacher have different tokenizers ({_differences(tokenizer, other_tokenizer)}). {NEEDS_BRIDGE}"
        )
    contexts = [getattr(config, "max_position_embeddings", None) for config in (student, teacher)]
    shared = contexts if other_tokenizer is None else contexts[:1]  # lengths are counted in the student's tokens
    context = min((size for size in shared if size is not None), default=None)
    chosen = select_layers(layers, depths[0])
    return Shapes(chosen, depths[0], vocab_size, context, other_size, contexts[1], mapped)


def check_layer_map(
    given: Sequence[int] | None, recorded: Sequence[int] | None, depth: int, teacher_depth: int
) -> tuple[int, ...] | None:
    """The layer map that states are compared through: the user's, else the one that ``oprd prune`` recorded, else None.

    Raises:
        ValueError: a map of another length, of layers that the teacher does not have, or that descends; a pruned student
            whose teacher is not as deep as the model that it was pruned from.
    """
    layer_map = recorded if given is None else given
    if layer_map is None:
        return None
    said, shown = ("layer_map" if given is not None else "The student's record"), ",".join(map(str, layer_map))
    if given is None and max(layer_map) != teacher_depth:
        raise ValueError(
            f"The student was pruned from a model of {max(layer_map)} layers (layer map {shown}), and this teacher has "
            f"{teacher_depth}. Name that model, or one trained on from it, as the teacher, or set layer_map by hand."
        )
    if len(layer_map) != depth:
        raise ValueError(
            f"{said} {shown} names {len(layer_map)} layers for a student of {depth}. Set layer_map to one of the teacher's "
            "layers for each of the student's."
        )
    if min(layer_map) < 1 or max(layer_map) > teacher_depth or list(layer_map) != sorted(layer_map):
        raise ValueError(
            f"{said} {shown} must not descend, nor leave the teacher's layers 1..{teacher_depth}. Correct layer_map."
        )
    return tuple(layer_map)


def _check_bridge_shapes(bridge: Bridge, depths: list[int], widths: list[int]) -> None:
    found = (len(bridge.layer_map), bridge.student_dim, bridge.teacher_dim)
    if found != (depths[0], *widths) or max(bridge.layer_map) > depths[1]:
        raise ValueError(
            f"The bridge is for a student of {found[0]} layers x {found[1]} and a teacher x {found[2]} with at least "
            f"{max(bridge.layer_map)} layers; these are {depths[0]} x {widths[0]} and {depths[1]} x {widths[1]}. Fit one for "
            "this pair with oprd bridge fit."
        )


def _differences(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    own, other = student.get_vocab(), teacher.get_vocab()
    examples = sorted(token for token in own.keys() | other.keys() if own.get(token) != other.get(token))[:3]
    shown = ", ".join(f"{token!r} is {own.get(token)} and {other.get(token)}" for token in examples)
    return f"{len(own)} and {len(other)} tokens; {shown}"


def compare_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, prompt: Any) -> str:
    """``same``; ``other prompt`` (one vocabulary, and a chat template that renders prompts differently); or ``other
    tokens``."""
    if student.get_vocab() != teacher.get_vocab():
        return OTHER_TOKENS
    if isinstance(prompt, list) and teacher.chat_template and student.chat_template:
        renderings = [apply_template(t, prompt, add_generation_prompt=True, tokenize=False) for t in (student, teacher)]
        if renderings[0] != renderings[1]:
            return OTHER_PROMPT
    return SAME


def check_crossing(
    args: Any, student_size: int, teacher: PreTrainedTokenizerBase, prompt: Any, has_tools: bool
) -> None:
    """Settings that make sense where the teacher has another vocabulary.

    Raises:
        ValueError: a setting that needs one vocabulary; a teacher that cannot read chat prompts or has no end token.
    """
    if args.logit_weight:
        raise ValueError(
            "logit_weight compares logits of one vocabulary, and the tokenizers differ. Use output_loss: top_k."
        )
    if args.top_k_support != "student" or not args.top_k_renormalize:
        raise ValueError(
            "top_k_support and top_k_renormalize have no meaning across tokenizers: the support is the student's top k with "
            "the sampled token, and the rest is one event on both sides. Remove them."
        )
    if args.output_loss == "full" and student_size > WHOLE_VOCABULARY:
        raise ValueError(
            f"output_loss: full across tokenizers compares every pair of the student's {student_size} tokens at every position "
            f"(at most {WHOLE_VOCABULARY}). Use output_loss: top_k."
        )
    if has_tools:
        raise ValueError(
            "tools need one tokenizer: a teacher with another would read the student's rendering of results."
        )
    if isinstance(prompt, list) and not teacher.chat_template:
        raise ValueError(
            "Prompts are chat messages but the teacher's tokenizer has no chat template. Set its chat_template and save it, "
            "or give prompts as text."
        )
    if teacher.eos_token_id is None:
        raise ValueError("The teacher's tokenizer has no end token. Set its eos_token and save it.")


def check_end_tokens(
    tokenizer: PreTrainedTokenizerBase, student: set[int], teacher: set[int], teacher_main: int | None = None
) -> None:
    """The token with which the teacher ends a response must end the student's; else lengths explode.

    Args:
        student, teacher: every end token of either (tokenizer and generation config).
        teacher_main: the end token of the teacher's tokenizer, where that is known: the one it was trained to write.

    Raises:
        ValueError: the student has no end token, none in common, or not the teacher's main one.
    """
    if not student:
        raise ValueError("The student's tokenizer has no end token. Set tokenizer.eos_token and save it.")
    if (teacher and not student & teacher) or (teacher_main is not None and teacher_main not in student):
        names = [
            ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(ids))))
            for ids in (student, teacher if teacher_main is None else {teacher_main})
        ]
        raise ValueError(
            f"The student's responses end with {names[0]}, the teacher's with {names[1]}. Taught by this teacher the student "
            f"would never stop. Set eos_token: {names[1].split(', ')[0]!r} in the recipe."
        )


def named_datasets(train: Any, evaluation: Any) -> dict[str, Any]:
    """By the names that messages call them."""
    if isinstance(evaluation, dict):
        return {"train_dataset": train} | {f"eval_dataset[{name!r}]": rows for name, rows in evaluation.items()}
    return {"train_dataset": train} | ({} if evaluation is None else {"eval_dataset": evaluation})


def check_datasets(
    train: Dataset | IterableDataset | None,
    evaluation: Dataset | IterableDataset | dict[str, Dataset] | None = None,
    *,
    responses_per_prompt: int = 1,
) -> None:
    """Datasets with prompts in them.

    Raises:
        ValueError: none given, empty, without a ``prompt`` column, or streaming with several responses per prompt.
    """
    if train is None:
        raise ValueError("train_dataset is missing: pass a dataset with a 'prompt' column.")
    for name, dataset in named_datasets(train, evaluation).items():
        columns = dataset.column_names
        if columns is not None and "prompt" not in columns:
            raise ValueError(
                f"{name} has no 'prompt' column; it has {', '.join(columns) or 'none'}. Rename yours, or load the file "
                "with oprd.prompts.load_prompts, which knows the common layouts."
            )
        if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
            raise ValueError(f"{name} is empty.")
    if isinstance(train, IterableDataset) and responses_per_prompt > 1:
        raise ValueError("A streaming dataset gives each prompt once: set responses_per_prompt: 1 or load it whole.")


def check_attention(args: Any, attn_implementation: str | None) -> None:
    """Packed rows are read by an attention of this package's own, on top of ``sdpa``.

    Raises:
        ValueError: another implementation was asked for.
    """
    if args.is_packed and attn_implementation not in (None, "sdpa"):
        why = "max_tokens_per_microbatch" if args.max_tokens_per_microbatch is not None else "gradient_scope: suffix"
        raise ValueError(
            f"{why} needs attn_implementation: sdpa (the default; it takes FlashAttention's kernels by itself), got "
            f"{attn_implementation!r}. Unset one of the two."
        )


def check_step_size(num_prompts: int, responses_per_step: int, responses_per_prompt: int) -> None:
    """One step draws its prompts without repeats, so there must be that many.

    Raises:
        ValueError: too few prompts; no step could ever be taken.
    """
    needed = responses_per_step // responses_per_prompt
    if num_prompts < needed:
        raise ValueError(
            f"train_dataset has {num_prompts} prompts and one step needs {needed} (per_device_train_batch_size x "
            "gradient_accumulation_steps x processes / responses_per_prompt). Lower the batch, raise "
            "responses_per_prompt, or add prompts."
        )


def prompt_lengths(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, **template: Any) -> list[int]:
    """Tokens of every prompt as the student will read it."""
    prompts = dataset["prompt"]
    if isinstance(prompts[0], str):
        return [len(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    if not tokenizer.chat_template:
        raise ValueError(
            "Prompts are chat messages but the student's tokenizer has no chat template. Set tokenizer.chat_template and "
            "save it, or give prompts as text."
        )
    batch = 1000
    lengths: list[int] = []
    for start in range(0, len(prompts), batch):
        encoded = apply_template(
            tokenizer,
            list(prompts[start : start + batch]),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **template,
        )
        lengths += [len(ids) for ids in encoded["input_ids"]]
    return lengths


def fit_prompts(
    dataset: Dataset,
    lengths: list[int],
    *,
    context: int | None,
    max_prompt_length: int | None,
    max_completion_length: int,
    max_tokens_per_microbatch: int | None = None,
) -> Dataset:
    """Drop prompts over ``max_prompt_length`` (said aloud); refuse those that leave no room for a response, in the context
    or in a micro-batch.

    Raises:
        ValueError: a prompt without tokens or without room, with its row (from 1); or nothing left.
    """
    if 0 in lengths:
        raise ValueError(f"train_dataset, row {lengths.index(0) + 1}: the prompt has no tokens.")
    rows = list(range(1, len(lengths) + 1))
    if max_prompt_length is not None:
        kept = [index for index, length in enumerate(lengths) if length <= max_prompt_length]
        if not kept:
            raise ValueError(
                f"max_prompt_length={max_prompt_length} drops every prompt; the shortest has {min(lengths)} tokens."
            )
        if len(kept) < len(lengths):
            logger.warning(
                f"Dropped {len(lengths) - len(kept)} of {len(lengths)} prompts over {max_prompt_length} tokens."
            )
            dataset, lengths = dataset.select(kept), [lengths[index] for index in kept]
            rows = [index + 1 for index in kept]
    longest = max(lengths)
    if context is not None and longest + max_completion_length > context:
        over = sum(length + max_completion_length > context for length in lengths)
        room = context - max_completion_length
        drop = f", or set max_prompt_length: {room} to drop them" if room >= min(lengths) else ""
        raise ValueError(
            f"train_dataset, row {rows[lengths.index(longest)]}: a prompt of {longest} tokens and a response of "
            f"{max_completion_length} do not fit the context of {context} ({over} such rows). "
            + (f"Lower max_completion_length{drop}." if longest < context else f"Remove the row{drop}.")
        )
    budget = max_tokens_per_microbatch
    if budget is not None and longest + max_completion_length > budget:
        over = sum(length + max_completion_length > budget for length in lengths)
        raise ValueError(
            f"train_dataset, row {rows[lengths.index(longest)]}: a prompt of {longest} tokens and a response of "
            f"{max_completion_length} do not fit max_tokens_per_microbatch={budget} ({over} such rows). Set it to at least "
            f"{longest + max_completion_length}, or lower max_completion_length or max_prompt_length."
        )
    return dataset
