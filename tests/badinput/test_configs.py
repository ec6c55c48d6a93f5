"""Recipes that cannot be: keys, values, YAML, and settings that contradict one another."""

import pytest

from badinput.harness import ABSENT, Case, call, cases, check_refused
from oprd.training.trainer import OPRDTrainer


def recipe(text):
    """A recipe of these bytes, whatever the settings."""
    return lambda place: place.write("recipe.yaml", text)


def line(text):
    """The good recipe with a line of YAML behind it."""

    def arrange(place):
        import yaml

        place.write("recipe.yaml", yaml.safe_dump(place.settings) + text + "\n")

    return arrange


def typed(*arguments):
    """The good recipe with words on the command line behind it."""
    return ("train", "--config", "{root}/recipe.yaml", *arguments)


IN_RECIPE = r"recipe\.yaml: "
NO_YAML = r"recipe \S+/recipe\.yaml is not valid YAML: "


@cases(
    Case("an unknown key", IN_RECIPE + "unknown key 'learning_rat'", "did you mean learning_rate", None, {"learning_rat": 1e-5}),
    Case("an unknown key like no other", IN_RECIPE + "unknown key 'zzz'", "oprd train --help lists the keys", None, {"zzz": 1}),
    Case("an unknown key typed", "Unknown key --max_stepz", "did you mean --max_steps", command=typed("--max_stepz", "3")),
    Case("an unknown key like no other typed", "Unknown key --qqq", "oprd train --help lists", command=typed("--qqq", "3")),
    Case("an unknown key of the second stage", "then: unknown key 'output_los'", "did you mean output_loss", None,
        {"then": {"output_los": "full"}}),
    Case("not YAML", NO_YAML, "line 2", recipe("a: [1,\nb: }\n")),
    Case("a list", r"recipe\.yaml holds a list", "must be a mapping of settings", recipe("- a\n- b\n")),
    Case("a word", r"recipe\.yaml holds a str", "must be a mapping of settings", recipe("miniature\n")),
    Case("empty", r"recipe\.yaml is empty", "must be a mapping of settings", recipe("")),
    Case("a key twice", r"recipe\.yaml: 'max_steps' is there twice, in lines \d+ and \d+", "Remove one", line("max_steps: 3")),
    Case("not UTF-8", r"recipe\.yaml is not UTF-8 text \(byte 4\)", "Save it as UTF-8", recipe(b"a: '\xff\xfe'\n")),
    Case("a tag that runs code", NO_YAML, "tag .*python/object",
        lambda place: place.write("recipe.yaml", f"output_dir: !!python/object/apply:exec [{place.payload()!r}]\n")),
    Case("no such recipe", r"no recipe \S+/gone\.yaml", "Give a YAML file, or one that ships", command=("train", "--config", "{root}/gone.yaml")),
    Case("a folder as recipe", r"/student is a folder", "Name the YAML file itself", command=("train", "--config", "{root}/student")),
    Case("no recipe named", "--config needs a recipe", "a YAML file, or the name of one", command=("train", "--config")),
    Case("a recipe without its key", r"Unexpected \S+recipe\.yaml", "--config", command=("train", "{root}/recipe.yaml")),
    Case("a value without a key", "Unexpected word", "its key before it", command=typed("word")),
    Case("a key without a value", "--max_steps: expected one argument", "oprd train --help", command=typed("--max_steps")),
)  # fmt: skip
def test_recipes(case, place, capfd):
    check_refused(case, place, capfd)


def value(key, given, culprit, remedy="Correct it, or remove the key", name=None):
    """A recipe with one bad value."""
    return Case(name or f"{key}: {given}", culprit, remedy, settings={key: given})


@cases(
    value("max_steps", "many", IN_RECIPE + "max_steps must be a whole number, got 'many'"),
    value("max_steps", 2.5, IN_RECIPE + r"max_steps must be a whole number, got 2\.5"),
    value("max_steps", True, IN_RECIPE + "max_steps must be a whole number, got True"),
    value("max_steps", None, IN_RECIPE + "max_steps must be a whole number, got nothing"),
    value("learning_rate", "fast", IN_RECIPE + "learning_rate must be a number, got 'fast'"),
    value("learning_rate", [1e-5], IN_RECIPE + r"learning_rate must be a number, got \[1e-05\]"),
    value("use_cpu", "perhaps", IN_RECIPE + "use_cpu must be true or false, got 'perhaps'"),
    value("tile_mlp", 2, IN_RECIPE + "tile_mlp must be true or false, got 2"),
    value("lora_target_modules", 3, IN_RECIPE + "lora_target_modules must be a list, got 3"),
    value("model_init_kwargs", [1], IN_RECIPE + r"model_init_kwargs must be text or a mapping, got \[1\]"),
    value("output_dir", 2024, IN_RECIPE + "output_dir must be text, got 2024"),
    value("model_name_or_path", ["a", "b"], IN_RECIPE + "model_name_or_path must be text"),
    value("eval_strategy", False, IN_RECIPE + "eval_strategy must be text, got False", "put it in quotes"),
    value("then", "words", "then must be a mapping", "settings for the second stage"),
    value("then", {"max_steps": "many"}, "then: max_steps must be a whole number", name="a bad value of the second stage"),
    value("then", {"temperature": 0}, "then: temperature must be", "more than 0", name="a bad number of the second stage"),
    value("layers", "4,x", "layers='4,x'", "a list of whole numbers such as 4,8,12"),
    value("layers", [9], r"\[9\] are outside", r"1\.\.3"),
    value("lr_scheduler_type", "wavy", "'wavy'", "cosine"),
    value("optim", "adamm", "'?adamm'?", "adamw_torch"),
    value("reduction", "sum", "reduction must be one of", "sequence, token"),
    value("dtype", "float8", "dtype must be auto, float32, bfloat16", "got 'float8'"),
    value("bridge_rank", "some", "bridge_rank must be", "auto, full or a positive number"),
    value("best_metric", "loss", "best_metric would be ignored", "set validation_benchmark"),
    Case("a number typed wrongly", "--max_steps: invalid int value: 'x'", "oprd train --help", command=typed("--max_steps", "x")),
    Case("a truth typed wrongly", "--use_cpu: Truthy value expected: got maybe", "oprd train --help", command=typed("--use_cpu", "maybe")),
)  # fmt: skip
def test_values(case, place, capfd):
    check_refused(case, place, capfd)


@cases(
    value("learning_rate", float("nan"), "learning_rate must be a number of more than 0, got nan", "more than 0"),
    value("learning_rate", float("inf"), "learning_rate must be a number of more than 0, got inf", "more than 0"),
    value("learning_rate", -1e-5, "learning_rate must be", "more than 0, got -1e-05"),
    value("max_steps", 0, "max_steps must be at least 1", "or -1 to go by num_train_epochs, got 0"),
    value("max_steps", -3, "max_steps must be at least 1", "or -1 to go by num_train_epochs, got -3"),
    value("temperature", 0, "temperature must be", "more than 0, got 0"),
    value("temperature", float("nan"), "temperature must be", "more than 0, got nan"),
    value("top_p", 1.5, "top_p must be", r"at most 1, got 1\.5"),
    value("per_device_train_batch_size", 0, "per_device_train_batch_size must be", "at least 1, got 0"),
    value("gradient_accumulation_steps", -1, "gradient_accumulation_steps must be", "at least 1, got -1"),
    value("max_completion_length", 0, "max_completion_length must be", "at least 1, got 0"),
    value("max_grad_norm", float("nan"), "max_grad_norm must be", "at least 0, got nan"),
    value("weight_decay", -0.1, "weight_decay must be", r"at least 0, got -0\.1"),
    value("adam_beta1", 2.0, "adam_beta1 must be", "at most 1, got 2"),
    value("num_train_epochs", 0, "num_train_epochs must be", "more than 0, got 0"),
    value("warmup_steps", -1, "warmup_steps must be", "at least 0, got -1"),
    value("seed", -1, "seed must be", "at least 0, got -1"),
    value("lora_r", 0, "lora_r must be", "at least 1, got 0"),
    value("representation_weight", float("nan"), "representation_weight must be", "not negative, got nan"),
    value("position_k", 0, "position_k must be", "at least 1, got 0"),
    value("responses_per_prompt", 3, "responses_per_prompt=3 does not divide", "per_device_train_batch_size x"),
    value("min_paired_share", 2.0, "min_paired_share must lie in", r"0\.\.1"),
    Case("not a number typed", "learning_rate must be", "more than 0, got nan", command=typed("--learning_rate", "nan")),
)  # fmt: skip
def test_numbers(case, place, capfd):
    check_refused(case, place, capfd)


def together(name, culprit, remedy, **settings):
    """Settings that contradict one another, or of which one would be ignored."""
    return Case(name, culprit, remedy, settings=settings)


@cases(
    together("a weight of no loss", "output_weight would be ignored", "Remove it", output_weight=2.0),
    together("a loss of no weight", "output_loss='full' would be ignored", "Set output_loss: none", output_loss="full", output_weight=0.0),
    together("k of no top-k", "output_top_k would be ignored", "Remove it", output_top_k=4),
    together("k of no positions", "position_k would be ignored", "Remove it", position_k=4),
    together("a loss of states that are not compared", "representation_loss would be ignored", "Remove it",
        representation_weight=0.0, representation_loss="mse", output_loss="full"),
    together("nothing to minimise", "Nothing to minimise", "set representation_weight, logit_weight, or output_loss", representation_weight=0.0),
    together("beta", r"beta=0\.5 would be ignored", "Choose one with output_loss", beta=0.5),
    together("rank of no bridge", "bridge_rank would be ignored", "set bridge to auto or to a folder", bridge_rank=4),
    together("samples of no benchmark", "benchmark_samples would be ignored", "set validation_benchmark or test_benchmarks", benchmark_samples=2),
    together("a benchmark without steps", "need benchmark_steps", "every so many updates", test_benchmarks="problems.jsonl"),
    together("an evaluation without prompts", "eval_strategy .* and eval_dataset_name", "one is missing", eval_strategy="steps", eval_steps=1),
    together("a head that is frozen and trained", "trainable: head and lm_head: freeze", "leave nothing to train",
        trainable="head", lm_head="freeze", output_loss="full"),
    together("a head that nothing reaches", "trainable: head needs a term", "set output_loss or logit_weight", trainable="head"),
    together("packing with another attention", "max_tokens_per_microbatch needs attn_implementation: sdpa", "Unset one of the two",
        max_tokens_per_microbatch=64, attn_implementation="eager"),
    together("a budget too small", r"row \d: a prompt of \d tokens .* max_tokens_per_microbatch=8", "Set it to at least", max_tokens_per_microbatch=8),
    together("half precision on a static cache", "cache_implementation: static .* bf16: true", "Unset cache_implementation, or set bf16: false",
        bf16=True, cache_implementation="static"),
    together("bf16 where there is none", "bf16", "use_cpu", bf16=True, use_cpu=False),
    together("no student", "No student", "set model_name_or_path", model_name_or_path=ABSENT),
    together("no teacher", "No teacher", "set teacher_model_name_or_path", teacher_model_name_or_path=ABSENT),
    together("no prompts", "No prompts", "set dataset_name", dataset_name=ABSENT),
    together("a miniature that is not", "'miniature:pupil'", "it has miniature:", model_name_or_path="miniature:pupil"),
    together("a way out of the package", r"'miniature:\.\./\.\./\.\./etc/passwd'", "it has miniature:", dataset_name="miniature:../../../etc/passwd"),
    together("an absolute way out of the package", "'miniature:/etc/passwd'", "it has miniature:", dataset_name="miniature:/etc/passwd"),
)  # fmt: skip
def test_contradictions(case, place, capfd):
    check_refused(case, place, capfd)


@cases(
    together("liger", "use_liger_kernel: true needs liger_kernel", "pip install liger-kernel, or unset it", use_liger_kernel=True),
    together("flash attention", "flash_attention_2|FlashAttention2", "not installed", attn_implementation="flash_attention_2"),
    together("an attention that is not", "'?guessing'?", "sdpa", attn_implementation="guessing"),
    together("vllm", "use_vllm: true needs vllm", r"pip install .oprd\[vllm\]., or set use_vllm: false", use_vllm=True),
    together("a tracker", "report_to: wandb needs wandb", "pip install wandb, or set report_to: none", report_to="wandb"),
    together("a tracker among others", "report_to: wandb needs wandb", "report_to: none", report_to=["none", "wandb"]),
    together("a tracker that is not", "diary", "report_to", report_to="diary"),
    together("8 bits of the teacher", "teacher_load_in_8bit needs bitsandbytes", r"oprd\[quantized\]", teacher_load_in_8bit=True),
    together("4 bits of the student", "load_in_4bit .*needs bitsandbytes", r"oprd\[quantized\]", load_in_4bit=True),
    together("8-bit Adam", "optim: adamw_8bit needs bitsandbytes", "optim: adamw_torch", optim="adamw_8bit"),
    together("a DeepSpeed file that is not there", r"deepspeed: there is no file zero\.json", "Name a JSON file", deepspeed="zero.json"),
    together("an FSDP file that is not there", r"fsdp_config: there is no file \S*fsdp\.json", "Name a JSON file", fsdp="full_shard", fsdp_config="fsdp.json"),
    together("DeepSpeed", "deepspeed needs deepspeed", r"oprd\[deepspeed\]", deepspeed={"zero_optimization": {"stage": 2}}),
    together("a compiler that is not there", "torch_compile_backend must be one of .*got 'nonesuch'", "inductor", torch_compile=True, torch_compile_backend="nonesuch"),
)  # fmt: skip
def test_packages(case, place, capfd):
    check_refused(case, place, capfd)


def test_good_input_comes_to_the_first_step(place, capfd):
    """What every case spoils is good otherwise."""
    arguments = Case("good", "", "").prepare(place)
    from oprd.cli import main

    with pytest.raises(AssertionError, match="a step was begun"):
        main(arguments)


@pytest.mark.parametrize("is_one", [True, False])
def test_a_student_that_is_its_own_teacher_is_told(place, capfd, monkeypatch, is_one):
    """It may be a control, so the run goes on."""
    monkeypatch.setattr(OPRDTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    settings = {"model_name_or_path": "student/"} | ({"teacher_model_name_or_path": "student"} if is_one else {})
    status, said = call(Case("", "", "", settings=settings).prepare(place), capfd)
    assert status == 130
    assert ("Student and teacher are one model (student)" in said) == is_one
