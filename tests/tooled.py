"""Chats with a tool: a tokenizer whose template shows calls and results, a calculator, and students who follow a script."""

import re

import torch
import transformers

from tiny import tiny_model

TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool.function.name }}{% endfor %}<end>{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}<assistant>{{ message.content }}{% for call in message.tool_calls or [] %}"
    '<call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</call>'
    "{% endfor %}<end>"
    "{% elif message.role == 'tool' %}<result>{{ message.content }}</result>"
    "{% else %}<{{ message.role }}>{{ message.content }}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<end>", "content": "text"},
    },
}
PIECES = [
    "<pad>",
    "<end>",
    "<tools>",
    "<system>",
    "<user>",
    "<assistant>",
    "<call>",
    "</call>",
    "<result>",
    "</result>",
]
PIECES += ['{"name": "', '", "arguments": {"', '": "', '"}}', "add", "terms", "\\boxed{"]
PIECES += [chr(code) for code in range(32, 127)]
VOCAB = len(PIECES)
END, ASSISTANT = PIECES.index("<end>"), PIECES.index("<assistant>")


def tooled_tokenizer(template=TEMPLATE, responses=RESPONSES):
    """One piece, one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<pad>"))
    longest = sorted(PIECES[:-95], key=len, reverse=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest)) + "|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    made.chat_template = template
    if responses:
        made.response_template = responses
    return made


def tooled_model(seed=0, **shape):
    return tiny_model(seed=seed, vocab_size=VOCAB, **shape)


def add(terms: str) -> str:
    """
    Adds two numbers.

    Args:
        terms: Such as 1+2.
    """
    first, second = terms.split("+")
    return str(int(first) + int(second))


def call(terms, name="add"):
    return f'<call>{{"name": "{name}", "arguments": {{"terms": "{terms}"}}}}</call><end>'


# What the student says to a question, turn by turn.
SCRIPTS = {
    "1+2": [call("1+2"), "\\boxed{3}<end>"],
    "4+5+6": [call("4+5"), call("9+6"), "\\boxed{15}<end>"],
    "7": ["\\boxed{7}<end>"],
    "8+x": [call("8+x"), "so what"],  # the tool fails, the answer is cut off
    "2+2": [call("2+2", name="sub"), "\\boxed{4}<end>"],  # no such tool
    "3+3": [call("3+3")[:-10] + "<end>"],  # a call that never ends is text
    "5+5": ["a" + call("5+5"), "b" + call("10+1"), "c" + call("11+1"), "\\boxed{12}<end>"],
    "6+1": [call("6+1")[:-5] + call("7+1"), "\\boxed{8}<end>"],  # two calls at once
}


def question_of(text):
    return text.rpartition("<user>")[2].partition("<end>")[0]


def user(text):
    return [{"role": "user", "content": text}]


def tooled_trainer(
    output_dir,
    *,
    tools=(add,),
    prompts=None,
    answers=None,
    model=None,
    teacher=None,
    scripts=None,
    trainer_kwargs=None,
    **settings,
):
    """An `OPRDTrainer` on tiny models whose student follows `SCRIPTS`; all around what it says is as in any run."""
    from datasets import Dataset

    from oprd import OPRDConfig, OPRDTrainer

    scripts = scripts or SCRIPTS
    tokenizer = tooled_tokenizer()

    class Scripted(OPRDTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
            texts = [tokenizer.decode(ids) for ids in prompt_ids]
            turns = [text.rpartition("<user>")[2].count("<assistant>") - 1 for text in texts]
            return [tokenizer(scripts[question_of(t)][n])["input_ids"] for t, n in zip(texts, turns, strict=True)]

    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": len(prompts or scripts),
        "max_completion_length": 90,
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
    columns = {"prompt": prompts or [user(question) for question in scripts]} | ({"answer": answers} if answers else {})
    return Scripted(
        model=model if model is not None else tooled_model(0),
        teacher_model=teacher if teacher is not None else tooled_model(1),
        args=OPRDConfig(output_dir=str(output_dir), **settings),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        tools=list(tools),
        **{"teacher_processing_class": tooled_tokenizer(), **(trainer_kwargs or {})},
    )


def twin_of(question):
    """The slow way: prompt, and every response token with whether the student wrote it, put together by hand."""
    tokenizer = tooled_tokenizer()
    prompt = tokenizer(f"<tools>add<end><user>{question}<end><assistant>")["input_ids"]
    response = []
    for turn in SCRIPTS[question]:
        response += [(token, True) for token in tokenizer(turn)["input_ids"]]
        results = ""
        for name, terms in re.findall(r'"name": "(\w+)", "arguments": {"terms": "([^"]*)"}}</call>', turn):
            try:
                said = {"add": add}[name](terms)
            except KeyError:
                said = str({"error": f"Tool {name} not found."})
            except ValueError as error:
                said = str({"error": str(error)})
            results += f"<result>{said}</result>"
        if results:
            response += [(token, False) for token in tokenizer(results + "<assistant>")["input_ids"]]
    return prompt, response


def memorised(chat, *, seed, steps=60, tools=(add,)):
    """A tiny model that knows one chat by heart, so that what it samples calls the tool."""
    tokenizer, model = tooled_tokenizer(), tooled_model(seed, width=32)
    ids = torch.tensor([tokenizer.apply_chat_template(chat, tools=list(tools), return_dict=False)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model, tokenizer
