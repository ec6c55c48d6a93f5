"""What each of this project's own settings means: one table for the config class and for ``--help`` (no torch here)."""

CHOICES: dict[str, tuple[str, ...]] = {
    "representation_loss": ("mse", "normalized_mse", "cosine", "transition"),
    "transition_over": ("positions", "layers", "both"),
    "layer_weighting": ("uniform", "teacher_rms", "adaptive"),
    "positions": ("all", "last", "first_k", "last_k", "random_k", "adaptive"),
    "state_at": ("predictive", "token"),
    "output_loss": ("none", "sampled", "top_k", "full"),
    "top_k_support": ("student", "teacher", "union", "intersection"),
    "reduction": ("sequence", "token"),
    "lm_head": ("auto", "teacher", "keep", "freeze", "solved"),
    "trainable": ("all", "head"),
    "gradient_scope": ("full", "suffix"),
    "on_nonfinite": ("stop", "skip"),
    "teacher_model_kind": ("base", "ema", "live"),
}

MAY_BE_OPEN = ("representation_loss", "teacher_model_kind")

DEFAULTS: dict[str, str | float | bool] = {  # those that are not None; what None means, the text of a setting says
    "representation_weight": 1.0,
    "transition_over": "positions",
    "layer_weighting": "uniform",
    "attention_weight": 0.0,
    "attention_layers": "last",
    "attention_keys": 64,
    "min_paired_share": 0.2,
    "layers": "all",
    "positions": "all",
    "position_k": 2000,
    "state_at": "predictive",
    "output_loss": "none",
    "output_weight": 1.0,
    "output_top_k": 16,
    "top_k_support": "student",
    "top_k_renormalize": True,
    "reduction": "sequence",
    "lm_head": "auto",
    "trainable": "all",
    "responses_per_prompt": 1,
    "gradient_scope": "full",
    "tile_mlp": False,
    "offload_targets": False,
    "on_nonfinite": "stop",
    "offload_teacher": False,
    "teacher_load_in_8bit": False,
    "teacher_update_rate": 0.005,
    "teacher_sync_steps": 1,
    "resume": False,
    "dataset_train_split": "train",
    "eval_split": "test",
    "drop_duplicates": False,
    "as_chat": False,
    "bridge_rank": "auto",
    "bridge_prompts": 2000,
    "bridge_held_out": 0.1,
    "bridge_ridge": 1e-8,
    "bridge_controls": True,
    "benchmark_samples": 4,
    "benchmark_temperature": 0.7,
    "benchmark_top_p": 0.95,
    "benchmark_batch_size": 128,
    "best_metric": "avg_at_k",
}

THEN_HELP = "Settings of a second stage that starts from the first one's final model: a mapping in the recipe."

HELP: dict[str, str] = {
    "representation_weight": "Weight of the hidden-state loss L_OPRD (Eq. 6); the mu of Eq. 7. 0 turns it off.",
    "representation_loss": "Distance between hidden states: mse (Eq. 6), normalized_mse (Eq. 14), cosine; or transition, between "
    "directions of change from one state to the next. By default mse, and normalized_mse through a bridge.",
    "transition_over": "Which changes representation_loss: transition compares: those from one compared position to the next, from one "
    "compared layer to the next, or both.",
    "layer_weighting": "Weight of each compared layer: uniform; teacher_rms (by one over the teacher's running mean square there); adaptive (more "
    "where student and teacher still differ more, by running means).",
    "attention_weight": "Weight of attention-map distillation, an extra term for a teacher of the student's family with as many heads "
    "(KL from the teacher's maps, at the compared positions).",
    "attention_layers": "Layers whose attention maps are compared: all, last, even, odd, or numbers. It is a dear term: keep them few.",
    "attention_keys": "Keys of such a map: the most recent ones, and the first token.",
    "bridge": "Folder of a fitted bridge (oprd bridge fit), needed where student and teacher differ in shape, origin or "
    "tokenizer and states are compared; auto fits one into output_dir/bridge first.",
    "min_paired_share": "With another tokenizer, the least share of the student's positions that must pair up with one of the "
    "teacher's for states to be compared.",
    "layers": "Layers compared: all, last, even, odd, or numbers such as 4,8,12. Layers count from 1.",
    "layer_map": "The teacher's layer that each student layer is compared with, such as 1,2,4,6, for a student with fewer layers. By "
    "default what oprd prune recorded in the student, else layer l with layer l.",
    "positions": "Response positions whose states are compared: all, last, first_k, last_k, random_k; adaptive: all, each "
    "weighted by how far apart student and teacher are there, against a running mean.",
    "position_k": "The k of first_k, last_k and random_k. A shorter response keeps all of its positions.",
    "state_at": "predictive: the state that predicts a token; token: the state at the token itself.",
    "logit_weight": "Weight of exact full-vocabulary logit matching through d x d Gram matrices. By default 0, or 1 where "
    "the student keeps an LM head that nothing else would train (never through a bridge).",
    "output_loss": "Next-token objective: none, sampled (Eq. 3), top_k (Eq. 5), full reverse KL (Eq. 4). With another tokenizer "
    "the teacher's side is summed over its own tokens (prefix marginals).",
    "output_weight": "Weight of the next-token objective.",
    "output_top_k": "The k of output_loss: top_k.",
    "top_k_support": "Whose top k: student, teacher, union, intersection.",
    "top_k_renormalize": "Renormalise both distributions on the support; false is the paper's experiments.",
    "reduction": "sequence: mean over each response, then over responses (Eq. 6); token: mean over all positions.",
    "lm_head": "teacher: start from the teacher's LM head; keep: the student's own; freeze: its own, not trained; "
    "solved: its own while it trains through a bridge, then W_T C_TS C_SS^-1 from a last pass (one vocabulary); "
    "auto: teacher where heads are untied and of one shape, solved through a bridge where no output loss trains the head, else "
    "keep.",
    "trainable": "all: the whole student; head: its LM head alone, to calibrate it (needs an output loss, untied).",
    "eos_token": "Token that ends the student's responses, where it is not its tokenizer's own (a base model taught by a chat "
    "model).",
    "responses_per_prompt": "Responses sampled for each prompt of a step.",
    "max_prompt_length": "Drop prompts longer than this many tokens, and say how many.",
    "max_tokens_per_microbatch": "Pack responses, with their prompts, into micro-batches of at most this many tokens; no padding, no "
    "attention from one to another. By default per_device_train_batch_size rows are padded to the longest.",
    "gradient_scope": "full; or suffix: no gradient before a response's first supervised position, whose keys and values are "
    "constants. Cheaper with positions: last_k, and an approximation (docs/results.md).",
    "tile_mlp": "Run the student's MLPs over tiles of 2048 tokens in training too: less memory, about 3 % more work.",
    "offload_targets": "Keep the teacher's states in pinned main memory until the student's layer needs them.",
    "on_nonfinite": "What to do with an update whose loss or gradient is NaN or infinite: stop the run, or skip the update and go "
    "on (stops after 10 in a row). Either way its batch is saved in faults/ and the layer and rows are named.",
    "offload_teacher": "Keep the teacher in main memory and bring it to the GPU for its forward only.",
    "teacher_url": "Address of an oprd serve-teacher that holds the teacher, instead of teacher_model_name_or_path "
    "(docs/serving.md). Its token is read from OPRD_TEACHER_TOKEN or teacher_token_file.",
    "teacher_token_file": "File that holds the token of teacher_url; by default the environment has it.",
    "teacher_load_in_8bit": "Load the teacher in 8 bits (bitsandbytes).",
    "teachers": "Several teachers by name, each with model_name_or_path (or url) and, if need be, model_revision, token_file, bridge, "
    "weight (1 by default) and when: {column: pattern}, which says what rows it reads. Without when and teacher_column every teacher reads every "
    "row.",
    "teacher_column": "Column that names each row's teacher.",
    "teacher_model_kind": "The student teaches itself, with teacher_prompt_template: base (as it is at the start; with LoRA the adapter "
    "off), ema (a moving average of it), live (as it is now).",
    "teacher_update_rate": "Share of the student that goes into the average of teacher_model_kind: ema.",
    "teacher_sync_steps": "Updates between two such averagings.",
    "teacher_prompt_template": "What the teacher reads for a prompt: text with {prompt} and columns that the student does not see, such as "
    "'{prompt} A solution: {solution}'. Of chat messages it fills the last one of the user. Braces of the text are written twice.",
    "max_teacher_prompt_length": "Most tokens of such a prompt: privileged text loses its end for it (the prompt and the response never "
    "do). By default what the teacher's context leaves.",
    "resume": "Continue from the newest checkpoint in output_dir also with other settings. (With the same ones the same command "
    "continues by itself.)",
}

BRIDGE_HELP: dict[str, str] = {
    "bridge_rank": "Rank: a number, full, or auto (Theorem 3's rule on held-out rows).",
    "bridge_prompts": "Prompts that the student answers, once each, for the fit.",
    "bridge_held_out": "Share of prompts that take no part in the fit and fill the report.",
    "bridge_ridge": "Ridge, relative to the student's mean variance.",
    "bridge_controls": "Fit the controls too (shuffled pairs, random teacher, random student), at up to four layers.",
}

DATA_HELP: dict[str, str] = {
    "dataset_name": "Prompts: a Hub id, or a parquet, json or jsonl file.",
    "dataset_config": "Configuration of a Hub dataset.",
    "dataset_train_split": "Split of a Hub dataset to train on.",
    "eval_dataset_name": "Prompts with answers to evaluate on; used when eval_strategy is not 'no'.",
    "eval_config": "Configuration of a Hub evaluation dataset.",
    "eval_split": "Split of a Hub evaluation dataset.",
    "prompt_column": "Column with the prompt; found by itself if it is prompt, problem or question.",
    "answer_column": "Column with the reference answer; found by itself if it is answer or reward_model.ground_truth.",
    "drop_duplicates": "Keep one row of those with the same prompt, and say how many went.",
    "tools": "Functions that the student may call while it answers: FILE.py:FUNCTION or MODULE:FUNCTION, separated by commas. Their "
    "files are run. max_completion_length counts results too; they are read and not trained on.",
    "as_chat": "Turn plain-text prompts into one user message, so that the chat template applies.",
}

BENCHMARK_HELP: dict[str, str] = {
    "validation_benchmark": "Problems whose score decides what is kept in output_dir/best: aime24, aime25, aimo, math500, gsm8k, a "
    "file or a Hub id.",
    "test_benchmarks": "Benchmarks that are reported and decide nothing, separated by commas.",
    "benchmark_steps": "Score every so many updates, before the first and after the last too.",
    "benchmark_samples": "Answers drawn for each problem.",
    "benchmark_temperature": "Temperature of those answers.",
    "benchmark_top_p": "top_p of those answers.",
    "benchmark_max_new_tokens": "Their most tokens; by default max_completion_length.",
    "benchmark_batch_size": "Answers drawn at once by each process.",
    "benchmark_limit": "The first so many problems of each benchmark only.",
    "best_metric": "What is best on the validation benchmark: avg_at_k, best_at_k or pass_at_N.",
}


def default_of(name: str) -> str:
    """The default of a setting as a recipe has it; empty where it is left open."""
    value = DEFAULTS.get(name, "")
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
