"""Settings of quantised students; and, where bitsandbytes is installed, runs of them from end to end."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import ModelConfig

from oprd.evaluation.sampling import load_engine
from oprd.lineage.card import _loading
from oprd.training import quantised
from oprd.training.callbacks import read_metrics
from oprd.training.quantised import check_origin, check_quantised, quantization_of, widen_adapters
from oprd.training.run import run
from oprd.training.source import Source
from tiny import tiny_model, tiny_tokenizer

IDS = torch.arange(2, 26).reshape(2, 12)
FOUR, EIGHT = {"load_in_4bit": True}, {"load_in_8bit": True}
BITS = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")
NOT_INSTALLED = "bitsandbytes is not installed"


def settings(**model):
    return ModelConfig(model_name_or_path="student", **model)


@pytest.mark.parametrize("bits", [FOUR, EIGHT], ids=["4", "8"])
@pytest.mark.parametrize(
    ("use_peft", "use_vllm", "second_stage", "said"),
    [
        (False, False, False, "leaves weights that cannot be trained. Set use_peft: true"),
        (True, True, False, "use_vllm: true needs the adapters merged .* Unset one of the two"),
        (True, False, True, "then: .*cannot be trained on. Remove then or load_in_"),
        (True, False, False, None),
    ],
)
def test_what_a_quantised_student_needs(bits, use_peft, use_vllm, second_stage, said):
    def check():
        args = SimpleNamespace(use_vllm=use_vllm)
        check_quantised(args, settings(use_peft=use_peft, **bits), second_stage=second_stage)

    if said is None:
        check()
        return
    with pytest.raises(ValueError, match=said):
        check()


@pytest.mark.parametrize(
    ("dtype", "bf16", "expected"),
    [("float32", True, torch.bfloat16), ("float32", False, torch.float32), ("bfloat16", False, torch.bfloat16)],
)
def test_products_are_in_the_format_of_the_forward(monkeypatch, dtype, bf16, expected):
    """Without the package transformers makes no such config; its fields are all that is looked at."""
    made = SimpleNamespace(bnb_4bit_compute_dtype=getattr(torch, dtype))
    monkeypatch.setattr(quantised, "get_quantization_config", lambda model: made)
    found = quantization_of(SimpleNamespace(bf16=bf16), settings(dtype=dtype, **FOUR))
    assert found.bnb_4bit_compute_dtype == expected


@pytest.mark.parametrize("quantised_base", [True, False])
def test_adapters_of_quantised_weights_are_float32(quantised_base):
    """Where others would be whatever PEFT and TRL made of them. In bf16 an update of 1e-5 can change nothing."""
    assert torch.tensor(0.02, dtype=torch.bfloat16) - 1e-5 == torch.tensor(0.02, dtype=torch.bfloat16)
    model = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear")).bfloat16()
    model.get_base_model().is_loaded_in_4bit = quantised_base
    widen_adapters(model)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32 if quantised_base else torch.bfloat16}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", None])
def test_a_student_that_is_quantised_in_its_files(tmp_path, method):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    quantised_config = {} if method is None else {"quantization_config": {"quant_method": method, "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config | quantised_config))
    if method != "bitsandbytes":
        check_origin(Source(str(tmp_path)))
        return
    with pytest.raises(ValueError, match=r"is quantised in its files.*Name the model that it was quantised from"):
        check_origin(Source(str(tmp_path)))


def test_the_card_says_how_to_load_it():
    assert _loading({}) == []
    assert "quantised to 4 bits" in "".join(_loading(FOUR)) and "8 bits" in "".join(_loading(EIGHT))


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """A model wide enough for blocks of 64 weights to differ, and prompts."""
    monkeypatch.chdir(tmp_path)
    tiny_model(width=64, layers=2).save_pretrained("teacher")
    tiny_tokenizer().save_pretrained("teacher")
    rows = [{"prompt": text, "answer": "1"} for text in ("ab", "hello", "q1w2", "zz", "k", "u", "p0", "vw")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "teacher"


def train(name, **more):
    keys = {
        "model_name_or_path": "teacher",
        "teacher_model_name_or_path": "teacher",
        "dataset_name": "prompts.jsonl",
        "output_dir": name,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "warmup_steps": 0,
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "lora_dropout": 0,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **more,
    }
    run([str(part) for key, value in keys.items() for part in (f"--{key}", value)])
    return [row["cosine"] for row in read_metrics(Path(name) / "metrics.jsonl") if "cosine" in row]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "more",
    [
        {**FOUR, "bnb_4bit_quant_type": "fp4"},
        {**FOUR, "gradient_checkpointing": True, "max_tokens_per_microbatch": 48},
        {**EIGHT, "learning_rate": 1e-4},
    ],
    ids=["fp4", "nf4, checkpointed and packed", "8 bits"],
)
def test_from_its_own_full_precision(teacher, more):
    """The quantised weights stay, bit for bit; adapters beside them bring it nearer to what it was."""
    pytest.importorskip("bitsandbytes", reason=NOT_INSTALLED)
    cosines = train("run", **more)
    loses_much = "load_in_4bit" in more  # 8 bits lose too little to be won back in three steps
    assert 0.5 < cosines[0] < 1 and (cosines[-1] > cosines[0] or not loses_much)
    final = AutoModelForCausalLM.from_pretrained("run/final", use_safetensors=True)
    adapters = {name: p for name, p in final.named_parameters() if "lora_" in name}
    assert adapters and {p.dtype for p in adapters.values()} == {torch.float32}
    assert sum(p.abs().sum() for name, p in adapters.items() if "lora_B" in name) > 0
    bits = {"bnb_4bit_quant_type": "nf4"} | {name: value for name, value in more.items() if name in BITS}
    start = AutoModelForCausalLM.from_pretrained(
        teacher, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**bits)
    )
    own, kept = start.model.layers[0].mlp.up_proj, final.model.layers[0].mlp.up_proj.base_layer
    assert torch.equal(own.weight, kept.weight)
    whole = logits(AutoModelForCausalLM.from_pretrained(teacher))
    assert not loses_much or (logits(final) - whole).norm() < (logits(start) - whole).norm()
    assert load_engine("run/final").generate([[2, 3]], _greedy(), 0)
    assert AutoTokenizer.from_pretrained("run/final").eos_token == "<eos>"
    with pytest.raises(ValueError, match="a whole model with an adapter beside it"):
        train("again", model_name_or_path="run/final", **FOUR)


def test_the_best_student_is_kept_the_same_way(teacher):
    """Training goes on behind it, so the adapters must stay on the model."""
    pytest.importorskip("bitsandbytes", reason=NOT_INSTALLED)
    cosines = train(
        "run",
        **FOUR,
        validation_benchmark="prompts.jsonl",
        benchmark_steps=2,
        benchmark_samples=1,
        benchmark_temperature=0,
    )
    assert len(cosines) == 3 and cosines[-1] > cosines[0]
    best = AutoModelForCausalLM.from_pretrained("run/best")
    assert any("lora_" in name for name, _ in best.named_parameters())


def _greedy():
    from oprd.evaluation.sampling import Sampling

    return Sampling(1, 0.0, 1.0, 4)
