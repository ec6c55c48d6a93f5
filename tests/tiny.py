"""Tiny models of real architectures, made from their configs, and rollouts to run them on."""

import torch
import transformers

VOCAB = 37

ARCHITECTURES = {
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "phi3": ("Phi3Config", {}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}),
}

# Attention that is not plain: grouped heads, windows shorter than the rows, every second layer with one, experts, values
# of another size than keys. For tests of attention; they take no part where every architecture does.
ATTENTIONS = {
    "grouped": ("LlamaConfig", {"num_attention_heads": 4}),
    "windows": ("MistralConfig", {"sliding_window": 3}),
    "windows in turn": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "experts": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "latent": (
        "DeepseekV3Config",
        {
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 3,
        },
    ),
}


def tiny_model(architecture="qwen3", *, seed=0, layers=3, width=16, vocab_size=VOCAB, tied=False, dtype=torch.float32):
    """A causal LM of a few thousand parameters."""
    name, extra = (ARCHITECTURES | ATTENTIONS)[architecture]
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    config = getattr(transformers, name)(**settings | extra)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype)


def tiny_batch(*, padding="left", seed=1, lengths=((3, 5), (5, 2), (2, 7), (4, 4))):
    """Prompt and completion ids with masks; ``padding`` is the prompts' side. Pads hold a real id, so a leak shows."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(2, VOCAB, (p,), generator=generator) for p, _ in lengths]
    completions = [torch.randint(2, VOCAB, (c,), generator=generator) for _, c in lengths]

    def pad(rows, side):
        width = max(map(len, rows))
        ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[index, where], mask[index, where] = row, 1
        return ids, mask

    (prompt_ids, prompt_mask), (completion_ids, completion_mask) = pad(prompts, padding), pad(completions, "right")
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
    }


def other_prompt(batch, shift=2):
    """A teacher whose prompts are ``shift`` tokens longer, and which then reads the student's tokens."""
    from oprd.states.views import TeacherText, close_gaps

    rows, width = batch["completion_ids"].shape
    ids = torch.cat([torch.full((rows, shift), 9), batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([torch.ones(rows, shift), batch["prompt_mask"], batch["completion_mask"]], 1).bool()
    before = (batch["prompt_mask"].sum(1) + shift - 1).unsqueeze(1) + torch.arange(width)
    nothing = torch.full((rows, 0, 4), -1)
    return TeacherText(close_gaps(ids, mask), before, before + 1, before, torch.zeros_like(before), nothing)


def reference_states(model, row_ids):
    """Hidden states of one unpadded row, the plain way: ``[L + 1, S, d]``, after the final norm for the last."""
    output = model(input_ids=row_ids.unsqueeze(0), output_hidden_states=True, use_cache=False)
    return torch.stack([h[0] for h in output.hidden_states])


def tiny_tokenizer():
    """One character, one token; as many as the tiny models have embeddings."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = "abcdefghijklmnopqrstuvwxyz0123456789"[: VOCAB - 2]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


WIDE = {"layers": 5, "width": 24}


def random_bridge(rank=3, *, student_width=16, teacher_width=24, layers=3, teacher_layers=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    from oprd.bridge import Bridge
    from oprd.objectives import map_layers

    return Bridge(
        map_layers(layers, teacher_layers),
        draw(layers, rank, student_width),
        draw(layers, student_width),
        draw(layers, rank, teacher_width),
        draw(layers, teacher_width),
    )


def merged_tokenizer():
    """The tiny tokenizer with pairs of letters as tokens of their own, most of them out of the reach of single letters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"[: VOCAB - 2]
    pairs = [a + b for a in letters for b in letters if (ord(a) + ord(b)) % 3]
    vocabulary = {token: index for index, token in enumerate(["<eot>", "<pad>", *pairs, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(p[0], p[1]) for p in pairs]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eot>", padding_side="left"
    )


PROMPTS = [
    "ab",
    "abcdef",
    "xyz",
    "hello",
    "q1w2e3",
    "zz",
    "maths",
    "k",
    "seven77",
    "tea",
    "p0",
    "longerprompt",
    "u",
    "vw",
    "99",
    "end",
]


def canned_completion(prompt_ids):
    """A response that depends on the prompt alone, of 1 to 9 tokens; some are cut off, some end."""
    generator = torch.Generator().manual_seed(sum((i + 1) * t for i, t in enumerate(prompt_ids)))
    length = int(torch.randint(1, 9, (), generator=generator))
    ids = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
    return [*ids, 1] if length % 2 else ids


def canned_trainer(
    output_dir,
    *,
    model=None,
    teacher=None,
    prompts=PROMPTS,
    answers=None,
    columns=None,
    trainer_kwargs=None,
    **settings,
):
    """An `OPRDTrainer` on tiny models whose rollouts are canned, so that runs can be compared exactly.

    ``columns`` are further columns of the dataset. Without a ``teacher`` it is a tiny model, or the student where settings say so.
    """
    from datasets import Dataset

    from oprd import OPRDConfig, OPRDTrainer

    class Canned(OPRDTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
            return [canned_completion(ids) for ids in prompt_ids]

    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "max_completion_length": 10,
        "learning_rate": 1e-2,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 1e9,
        "optim": "sgd",
        **settings,
    }
    columns = {"prompt": list(prompts)} | ({"answer": list(answers)} if answers else {}) | (columns or {})
    if teacher is None and not settings.get("teacher_model_kind"):
        teacher = tiny_model(seed=1)
    return Canned(
        model=model if model is not None else tiny_model(seed=0),
        teacher_model=teacher,
        args=OPRDConfig(output_dir=str(output_dir), **settings),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tiny_tokenizer(),
        **(trainer_kwargs or {}),
    )


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]
