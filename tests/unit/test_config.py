import warnings
from dataclasses import fields

import pytest
import torch
import yaml
from transformers import SchedulerType

from oprd import OPRDConfig
from oprd.training.config import parse_layers
from oprd.training.objective import Objective
from oprd.training.options import CHOICES, HELP
from oprd.training.teacher import check_settings, load_teacher


@pytest.fixture
def make(tmp_path):
    return lambda **settings: OPRDConfig(
        **{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"} | settings
    )


@pytest.mark.parametrize("given", [{}, {"gradient_checkpointing": False}, {"activation_checkpointing": True}], ids=str)
def test_nobody_is_warned_of_a_name_of_trls(make, given):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        config = make(**given)
    wanted = next(iter(given.values()), True)  # TRL's default
    assert config.activation_checkpointing is config.gradient_checkpointing is wanted


def test_defaults(make):
    config = make()
    own = {name: getattr(config, name) for name in HELP if name != "resume"}
    assert own == {
        "representation_weight": 1.0,
        "representation_loss": None,  # mse, and normalized_mse through a bridge
        "transition_over": "positions",
        "layer_weighting": "uniform",
        "attention_weight": 0.0,
        "attention_layers": "last",
        "attention_keys": 64,
        "bridge": None,
        "min_paired_share": 0.2,
        "trainable": "all",
        "eos_token": None,
        "layers": "all",
        "layer_map": None,
        "positions": "all",
        "position_k": 2000,
        "state_at": "predictive",
        "logit_weight": None,
        "output_loss": "none",
        "output_weight": 1.0,
        "output_top_k": 16,
        "top_k_support": "student",
        "top_k_renormalize": True,
        "reduction": "sequence",
        "lm_head": "auto",
        "responses_per_prompt": 1,
        "max_prompt_length": None,
        "max_tokens_per_microbatch": None,
        "gradient_scope": "full",
        "tile_mlp": False,
        "offload_targets": False,
        "offload_teacher": False,
        "teacher_load_in_8bit": False,
        "on_nonfinite": "stop",
        "teacher_url": None,
        "teacher_token_file": None,
        "teachers": None,
        "teacher_column": None,
        "teacher_model_kind": None,
        "teacher_update_rate": 0.005,
        "teacher_sync_steps": 1,
        "teacher_prompt_template": None,
        "max_teacher_prompt_length": None,
    }
    assert (config.learning_rate, config.warmup_steps, config.beta) == (1e-5, 0.03, 1.0)
    assert config.lr_scheduler_type == SchedulerType.COSINE


@pytest.mark.parametrize("available", [True, False])
def test_bf16_is_not_chosen_for_the_cpu_whatever_the_machine_has(make, monkeypatch, available):
    monkeypatch.setattr("oprd.training.config.is_torch_bf16_gpu_available", lambda: available)
    assert make().bf16 is False
    assert make(bf16=True).bf16 is True


@pytest.mark.parametrize("name", CHOICES)
def test_choices(make, name):
    needed = {"output_loss": "top_k"} if name.startswith(("top_k", "trainable")) else {}
    needed |= {"representation_loss": "transition"} if name == "transition_over" else {}
    needed |= {"teacher_prompt_template": "{prompt}"} if name == "teacher_model_kind" else {}
    for allowed in CHOICES[name]:
        assert getattr(make(**{name: allowed, **needed}), name) == allowed
    with pytest.raises(ValueError, match=f"{name} must be one of {', '.join(CHOICES[name])}, got 'other'"):
        make(**{name: "other"})


@pytest.mark.parametrize("name", ["representation_weight", "logit_weight", "output_weight"])
def test_negative_weights(make, name):
    with pytest.raises(ValueError, match=f"{name} must be a number that is not negative, got -0.5"):
        make(**{name: -0.5})


@pytest.mark.parametrize(
    "name", ["position_k", "output_top_k", "responses_per_prompt", "max_prompt_length", "max_tokens_per_microbatch"]
)
@pytest.mark.parametrize("value", [0, -3])
def test_counts_below_one(make, name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        make(**{name: value})


OFF = {"representation_weight": 0.0, "logit_weight": 0.0}


@pytest.mark.parametrize(
    "settings", [OFF, OFF | {"output_loss": "full", "output_weight": 0.0}, OFF | {"output_weight": 5}]
)
def test_nothing_to_minimise(make, settings):
    with pytest.raises(ValueError, match="Nothing to minimise"):
        make(**settings)


@pytest.mark.parametrize(
    "one", [{"representation_weight": 0.1}, {"logit_weight": 0.1}, {"output_loss": "sampled"}, {"output_loss": "top_k"}]
)
def test_one_term_is_enough(make, one):
    config = make(**OFF | one)
    assert {name: getattr(config, name) for name in one} == one


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_beta_would_be_ignored(make, beta):
    with pytest.raises(ValueError, match=f"beta={beta} would be ignored"):
        make(beta=beta)


def test_responses_per_prompt_divides_a_step(make):
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    for responses in (1, 2, 3, 4, 6, 12):
        assert make(**batch, responses_per_prompt=responses).responses_per_prompt == responses
    for responses in (5, 8, 24):
        with pytest.raises(ValueError, match=f"responses_per_prompt={responses} does not divide the 12 responses"):
            make(**batch, responses_per_prompt=responses)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("all", "all"),
        ("last", "last"),
        ("4,8,12", [4, 8, 12]),
        ("4, 8", [4, 8]),
        ("[4, 8, 12]", [4, 8, 12]),
        ("(4, 8)", [4, 8]),
        ("4", [4]),
        ("4,", [4]),
        ("-1", [-1]),
        ("1,-1", [1, -1]),
        (4, [4]),
        ([4, 8], [4, 8]),
        ((4, 8), [4, 8]),
    ],
)
def test_parse_layers(make, written, expected):
    assert parse_layers(written) == expected
    assert make(layers=written).layers == expected


@pytest.mark.parametrize("written", ["4:8", "4,x", "layer 4", "[4, 8", "4-"])
def test_layers_that_are_no_numbers(make, written):
    with pytest.raises(ValueError, match="neither a name nor a list of whole numbers such as 4,8,12"):
        make(layers=written)


@pytest.mark.parametrize("line", ["layers: 4,8,12", "layers: [4, 8, 12]", "layers: '4,8,12'"])
def test_layers_as_a_recipe_writes_them(line):
    assert parse_layers(yaml.safe_load(line)["layers"]) == [4, 8, 12]


def test_the_objective_carries_every_setting(make):
    chosen = {
        "representation_weight": 0.5,
        "representation_loss": "cosine",
        "logit_weight": 0.25,
        "output_loss": "top_k",
        "output_weight": 0.125,
        "output_top_k": 7,
        "top_k_support": "union",
        "top_k_renormalize": False,
        "temperature": 0.75,
        "offload_targets": True,
        "positions": "adaptive",
        "layer_weighting": "adaptive",
        "attention_weight": 0.5,
        "attention_keys": 9,
    }
    defaults = {field.name: field.default for field in fields(Objective)}
    assert all(value != defaults[name] for name, value in chosen.items())
    shapes = {"num_layers": 4, "vocab_size": 99, "layer_map": (1, 2, 4, 6)}
    settings = make(layers="all", attention_layers="2,-1", **chosen)
    objective = settings.objective(layers=[1, 3], head_adopted=True, **shapes)
    assert objective == Objective(layers=(1, 3), attention_layers=(2, 4), **shapes, **chosen)
    settings = make(representation_loss="transition", transition_over="both")
    assert settings.objective(layers=[1], head_adopted=True, **shapes).transition_over == "both"
    elsewhere = {"layers", "layer_map", "bridge", "attention_layers", "transition_over"}
    assert {name for name in HELP if name in defaults} - elsewhere <= set(chosen)


def test_an_open_distance_is_settled_by_the_bridge(make):
    shapes = {"layers": [1], "num_layers": 1, "vocab_size": 9, "head_adopted": False}
    bridge = object()
    assert make().objective(**shapes).representation_loss == "mse"
    through = make().objective(bridge=bridge, **shapes)
    assert (through.representation_loss, through.logit_weight) == ("normalized_mse", 0.0)
    assert make(representation_loss="mse").objective(bridge=bridge, **shapes).representation_loss == "mse"


@pytest.mark.parametrize("value", ["4.5", "1e1", 4.5, None, "4,8.7", True, "{4: 8}", "[1,", ["a"]])
def test_layers_that_are_no_whole_numbers(value):
    with pytest.raises(ValueError, match="whole numbers such as 4,8,12"):
        parse_layers(value)


@pytest.mark.parametrize(("name", "value"), [("logit_weight", float("nan")), ("output_weight", float("inf"))])
def test_weights_that_are_no_numbers(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        OPRDConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_max_prompt_length_of_zero(tmp_path):
    with pytest.raises(ValueError, match="max_prompt_length must be at least 1"):
        OPRDConfig(output_dir=str(tmp_path), use_cpu=True, max_prompt_length=0)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"output_weight": 5.0}, "output_weight would be ignored .output_loss: none"),
        ({"output_loss": "full", "output_weight": 0.0}, "output_weight is 0"),
        ({"output_loss": "full", "output_top_k": 4}, "output_top_k would be ignored"),
        ({"output_loss": "sampled", "top_k_renormalize": False}, "top_k_renormalize would be ignored"),
        (
            {"representation_weight": 0, "logit_weight": 1.0, "bridge": "x"},
            "bridge would be ignored .representation_weight",
        ),
        (
            {"representation_weight": 0, "logit_weight": 1.0, "representation_loss": "mse"},
            "representation_loss would be ignored",
        ),
        ({"trainable": "head"}, "trainable: head needs a term that reaches the LM head"),
        ({"trainable": "head", "output_loss": "full", "lm_head": "freeze"}, "leave nothing to train"),
        (
            {"trainable": "head", "output_loss": "full", "gradient_scope": "suffix"},
            "gradient_scope would be ignored .trainable: head",
        ),
        (
            {"representation_weight": 0, "logit_weight": 1.0, "offload_targets": True},
            "offload_targets would be ignored .representation_weight is 0",
        ),
        ({"min_paired_share": 1.5}, "min_paired_share must lie in 0..1"),
        ({"position_k": 5}, "position_k would be ignored .positions: all takes no k"),
    ],
)
def test_settings_that_would_be_ignored(tmp_path, settings, named):
    with pytest.raises(ValueError, match=named):
        OPRDConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("settings", "packed"),
    [
        ({}, False),
        ({"max_tokens_per_microbatch": 1}, True),
        ({"gradient_scope": "suffix"}, True),
        ({"offload_targets": True, "offload_teacher": True}, False),
    ],
    ids=str,
)
def test_when_rows_are_packed(make, settings, packed):
    assert make(**settings).is_packed is packed


@pytest.mark.parametrize(
    ("settings", "installed", "is_path", "told"),
    [
        ({"teacher_load_in_8bit": True}, False, True, 'needs bitsandbytes: pip install "oprd.quantized."'),
        ({"teacher_load_in_8bit": True}, True, False, "teacher_load_in_8bit would be ignored: the teacher is already"),
        ({"teacher_model_revision": "x"}, True, False, "would be ignored: the teacher is already a model"),
        ({"teacher_load_in_8bit": True, "offload_teacher": True}, True, True, "unset offload_teacher or teacher_load"),
        (
            {"teacher_load_in_8bit": True, "teacher_model_init_kwargs": {"quantization_config": {"bits": 4}}},
            True,
            True,
            "quantised twice",
        ),
    ],
    ids=str,
)
def test_weights_of_the_teacher_that_cannot_be(make, monkeypatch, settings, installed, is_path, told):
    monkeypatch.setattr("oprd.training.teacher.find_spec", lambda name: object() if installed else None)
    with pytest.raises(ValueError, match=told):
        check_settings(make(**settings), is_path=is_path)


@pytest.mark.parametrize("is_path", [True, False])
def test_weights_of_the_teacher_that_can_be(make, monkeypatch, is_path):
    monkeypatch.setattr("oprd.training.teacher.find_spec", lambda name: object())
    check_settings(make(offload_teacher=True), is_path=is_path)
    check_settings(make(), is_path=is_path)
    if is_path:
        check_settings(make(teacher_load_in_8bit=True, teacher_model_init_kwargs={"dtype": "bfloat16"}), is_path=True)


@pytest.mark.parametrize(
    ("settings", "processes", "device_map"),
    [({}, 1, "not given"), ({"offload_teacher": True}, 1, None), ({}, 2, None)],
    ids=str,
)
def test_where_a_teacher_is_loaded(make, monkeypatch, settings, processes, device_map):
    """One that waits in main memory, or is one process's own, is not split over devices."""
    asked = {}
    monkeypatch.setattr("oprd.training.teacher.create_model_from_path", lambda path, **kwargs: asked.update(kwargs))
    load_teacher("there", make(**settings), torch.bfloat16, processes)
    assert asked.get("device_map", "not given") == device_map
    assert asked["dtype"] == torch.bfloat16
    assert "quantization_config" not in asked


def test_a_teacher_of_8_bits_keeps_its_head(make, monkeypatch):
    asked = {}
    monkeypatch.setattr("oprd.training.teacher.create_model_from_path", lambda path, **kwargs: asked.update(kwargs))
    load_teacher("there", make(teacher_load_in_8bit=True), torch.float32, 1)
    assert asked["quantization_config"].load_in_8bit
    # Left open, transformers leaves out output embeddings under any name; a list of ours would replace that.
    assert asked["quantization_config"].llm_int8_skip_modules is None
