"""``oprd bridge`` and training through one, on the command line: another shape, another template, another tokenizer."""

import json

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from oprd.bridge import Bridge
from oprd.cli import main
from oprd.training import bridging
from oprd.training.callbacks import read_metrics

STUDENT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEACHER_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = [
    f"What is {a} + {b}? Let us think: {a} + {b} = {a + b}. Größe, 数学, 😀 \\boxed{{{a + b}}}"
    for a in range(9)
    for b in range(9)
]


def tokenizer(size, special, template, **names):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=template, padding_side="left", model_max_length=512, **names
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A Qwen2 base student that ends with <|endoftext|>, and a deeper, wider Llama chat teacher with tokens of its own."""
    root = tmp_path_factory.mktemp("pair")
    own = tokenizer(
        300,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        STUDENT_TEMPLATE,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    other = tokenizer(
        420,
        ["<s>", "<|pad|>", "<|eot|>", "<|end|>", "<|user|>", "<|assistant|>"],
        TEACHER_TEMPLATE,
        bos_token="<s>",
        eos_token="<|eot|>",
        pad_token="<|pad|>",
    )
    shape = {
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(0)
    student = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(own) + 4,
            hidden_size=16,
            num_hidden_layers=2,
            eos_token_id=own.eos_token_id,
            bos_token_id=None,
            pad_token_id=own.pad_token_id,
            **shape,
        )
    )
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(other),
            hidden_size=24,
            num_hidden_layers=3,
            eos_token_id=other.eos_token_id,
            bos_token_id=other.bos_token_id,
            pad_token_id=other.pad_token_id,
            **shape,
        )
    )
    for name, model, tok in (("student", student, own), ("teacher", teacher, other)):
        model.save_pretrained(root / name)
        tok.save_pretrained(root / name)
    rows = [{"prompt": [{"role": "user", "content": text.split("?")[0] + "?"}], "answer": "1"} for text in TEXTS]
    (root / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def recipe(pair, tmp_path, **settings):
    path = tmp_path / "recipe.yaml"
    base = {
        "model_name_or_path": str(pair / "student"),
        "teacher_model_name_or_path": str(pair / "teacher"),
        "dataset_name": str(pair / "prompts.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "max_completion_length": 12,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "bridge_prompts": 40,
    }
    path.write_text(yaml.safe_dump({k: v for k, v in (base | settings).items() if v is not None}))
    return str(path)


def test_fit_inspect_and_train(pair, tmp_path, capsys):
    config = recipe(pair, tmp_path, bridge=str(tmp_path / "bridge"), bridge_rank=3)
    assert main(["bridge", "fit", "--config", config]) == 0
    printed = capsys.readouterr()
    assert "rank 3: as asked" in printed.out and "shuffled pairs" in printed.out
    names = {p.name for p in (tmp_path / "bridge").iterdir()} - {".lock"}
    assert names == {"bridge.json", "bridge.safetensors", "plots"}
    bridge = Bridge.from_pretrained(tmp_path / "bridge")
    assert (bridge.rank, bridge.layer_map, bridge.student_dim, bridge.teacher_dim) == (3, [1, 3], 16, 24)
    assert set(bridge.fitted_for) == {"student", "teacher", "student_tokenizer", "teacher_tokenizer"}
    report = bridge.report
    assert report["data"]["prompts"] == 40 and report["fit"]["rows_held_out"] > 0
    assert report["data"]["paired_share"] > 0.5
    assert report["controls"]["bridge"]["explained"] > report["controls"]["shuffled_pairs"]["explained"]
    assert 0 <= report["prediction"]["student_agreement"] <= 1
    assert main(["bridge", "inspect", str(tmp_path / "bridge"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rank"]["taken"] == 3
    assert main(["bridge", "fit", "--config", config]) == 1
    assert "already holds a bridge" in capsys.readouterr().err
    assert main(["train", "--config", config]) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["paired_share"] > 0.5 and 0 < rows[0]["cosine"] <= 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")


def test_one_command_for_both_stages(pair, tmp_path, capsys):
    """bridge: auto, then the LM head by prefix marginals; a repeated command finds the stages done."""
    then = {"representation_weight": 0, "output_loss": "top_k", "trainable": "head"}
    config = recipe(pair, tmp_path, bridge="auto", eos_token="<|im_end|>", then=then)
    assert main(["train", "--config", config, "--max_steps", "3", "--seed", "3"]) == 0
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / "run" / d / "final") for d in ("", "then"))
    start = AutoModelForCausalLM.from_pretrained(pair / "student")
    states = [model.state_dict() for model in (start, first, second)]
    changed = [{n for n in states[0] if not states[i][n].equal(states[i + 1][n])} for i in (0, 1)]
    assert "lm_head.weight" not in changed[0] and len(changed[0]) > 10
    assert changed[1] == {"lm_head.weight"}
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    assert saved.eos_token == "<|im_end|>"
    assert (
        saved.eos_token_id
        in AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").generation_config.eos_token_id
    )
    record = yaml.safe_load((tmp_path / "run" / "then" / "config.yaml").read_text())
    assert (record["max_steps"], record["seed"], record["output_loss"]) == (3, 3, "top_k")
    assert "bridge_rank" not in record and record["bridge"] is None
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["bridge"] == "auto"
    capsys.readouterr()
    assert main(["train", "--config", config, "--max_steps", "3"]) == 1
    assert "holds a finished run" in capsys.readouterr().err


def test_an_unknown_key_of_the_second_stage_is_found_before_the_first(pair, tmp_path, capsys):
    config = recipe(pair, tmp_path, bridge="auto", then={"output_los": "full"})
    assert main(["train", "--config", config]) == 1
    assert "then: unknown key 'output_los'; did you mean output_loss?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "bridge_prompts would be ignored"),
        ({"bridge_prompts": None}, "have different tokenizers|layers of width 16, the teacher 3 of width 24"),
        ({"bridge": "nowhere"}, "There is no bridge in nowhere"),
        ({"bridge": "auto", "bridge_prompts": 5}, "leave none to hold out"),
        ({"bridge": "auto", "bridge_rank": "x"}, "bridge_rank must be auto, full or a positive number"),
        ({"bridge": "auto", "bridge_rank": 17}, "rank must be auto, full or 1..16, got 17"),
        ({"bridge": "auto", "eos_token": "<eos>"}, "'<eos>' is not a token of the student's"),
        ({"bridge": "auto", "logit_weight": 1.0}, "logit_weight compares logits of one vocabulary"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_first(pair, tmp_path, capsys, settings, told):
    import re

    assert main(["train", "--config", recipe(pair, tmp_path, **settings)]) == 1
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "run" / "final").exists()


def test_a_killed_fit_goes_on_where_it_was(pair, tmp_path, monkeypatch):
    """Two fits, one of them killed half-way, sum up the same states."""
    monkeypatch.setattr(bridging, "SAVE_SECONDS", 0.0)
    args = ["bridge", "fit", "--bridge_rank", "4"]
    whole = recipe(pair, tmp_path, bridge=str(tmp_path / "whole"))
    assert main([*args, "--config", whole]) == 0
    config = recipe(pair, tmp_path, bridge=str(tmp_path / "cut"))
    honest, calls = bridging._add_in_pieces, []

    def killed(*arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        honest(*arguments)

    monkeypatch.setattr(bridging, "_add_in_pieces", killed)
    assert main([*args, "--config", config]) == 130
    assert list((tmp_path / "cut").glob("collected-*"))
    again = []
    monkeypatch.setattr(bridging, "_add_in_pieces", lambda *a: (again.append(1), honest(*a)))
    assert main([*args, "--config", config]) == 0
    assert len(calls) + len(again) == 5
    one, two = (Bridge.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
    for name, tensor in one._tensors.items():
        torch.testing.assert_close(two._tensors[name], tensor, atol=1e-5, rtol=1e-4)
    assert one.report["fit"]["rows"] == two.report["fit"]["rows"]
    assert not list((tmp_path / "cut").glob("collected-*"))


def test_a_template_of_its_own_shifts_the_teacher_and_nothing_else(pair, tmp_path):
    """One vocabulary, another chat template: the teacher reads its own prompt, then the student's tokens."""
    from datasets import load_dataset

    from oprd import OPRDConfig, OPRDTrainer

    own = AutoTokenizer.from_pretrained(pair / "student")
    other = AutoTokenizer.from_pretrained(pair / "student")
    other.chat_template = "<|im_start|>system\nBe brief.<|im_end|>\n" + STUDENT_TEMPLATE
    own.eos_token = other.eos_token = "<|im_end|>"
    trainer = OPRDTrainer(
        model=str(pair / "student"),
        teacher_model=str(pair / "student"),
        args=OPRDConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_completion_length=8,
            report_to="none",
            gradient_checkpointing=False,
        ),
        train_dataset=load_dataset("json", data_files=str(pair / "prompts.jsonl"), split="train"),
        processing_class=own,
        teacher_processing_class=other,
    )
    rows = [trainer.train_dataset[i] for i in range(4)]
    batch = trainer._generate_and_score_completions(rows)
    rollout = trainer.make_rollout(batch)
    extra = len(other("<|im_start|>system\nBe brief.<|im_end|>\n")["input_ids"])
    assert (rollout.state_pairs.teacher_N - rollout.state_pairs.student_N).tolist() == [extra] * len(
        rollout.state_pairs
    )
    assert rollout.output_pairs.teacher_N.equal(rollout.state_pairs.teacher_N)
    for row in range(4):
        read = rollout.teacher.ids_BS[row][rollout.teacher.mask_BS[row]]
        expected = other.apply_chat_template(rows[row]["prompt"], add_generation_prompt=True)["input_ids"]
        assert read.tolist() == expected + batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
    # A teacher that is the student itself but for the prompt is at a distance of zero only where the prompt is the same.
    assert trainer.compute_loss(trainer.model, batch) > 1e-6


def test_the_turn_of_a_chat_teacher_ends_as_its_template_says(pair):
    from oprd.models import end_of_turn

    other = AutoTokenizer.from_pretrained(pair / "teacher")
    assert other.convert_ids_to_tokens(end_of_turn(other, chat=True)) == "<|end|>"
    assert other.convert_ids_to_tokens(end_of_turn(other, chat=False)) == "<|eot|>"
