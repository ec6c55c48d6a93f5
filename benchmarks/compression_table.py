"""Compressed students (docs/results.md): layers taken out of a teacher, or its weights quantised, and what brings it back.

    python benchmarks/compression_table.py                     # run what is missing, then print the table
    python benchmarks/compression_table.py --only "5 layers, OPRD"
    python benchmarks/compression_table.py --print             # from benchmarks/recorded

Pruned students are miniature:wide-teacher (6 layers x 96) without the one or two layers of lowest influence (oprd prune),
compared with it through the layer map. Quantised students are miniature:teacher in 4 bits (fp4; bitsandbytes must be
installed) with LoRA on top, taught by their own float32 selves. Every run has one budget: 200 updates of 16 prompts x 2
responses. See benchmarks/sweeping.py for how rows are swept and scored; rows with one rate take a swept neighbour's.
"""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sweeping import Key, Row, Table, main

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUT = Path("runs/compression")
TEACHER = "miniature:wide-teacher"
DEPTH = 6
OPRD = {"representation_weight": 1, "logit_weight": 0, "output_loss": "none"}
KL = {"representation_weight": 0, "logit_weight": 0, "output_loss": "full"}
BOTH = {**OPRD, "output_loss": "full"}
FOUR_BITS = {
    "model_name_or_path": "miniature:teacher",
    "teacher_model_name_or_path": "miniature:teacher",
    "lm_head": "auto",
    "load_in_4bit": "true",
    "bnb_4bit_quant_type": "fp4",
    "use_peft": "true",
    "lora_r": 8,
    "lora_dropout": 0,
    "lora_target_modules": "all-linear",
}


def pruned(name: str) -> dict:
    """A student among those that `make_students` makes, and its teacher."""
    return {"model_name_or_path": OUT / "students" / name, "teacher_model_name_or_path": TEACHER, "lm_head": "auto"}


def merged(key: Key, directory: Path, arguments: dict) -> Path:
    """The student of `QUANTISED` with its adapters merged into the 4 bits, as it would be if it were saved so."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    base = _quantised("miniature:teacher", "fp4")
    trained = TABLE.directory_of((QUANTISED, *key[1:])) / "final"
    student = PeftModel.from_pretrained(base, trained, use_safetensors=True)
    student.merge_and_unload().save_pretrained(directory / "final")
    AutoTokenizer.from_pretrained(trained).save_pretrained(directory / "final")
    return directory / "final"


QUANTISED = "fp4 + LoRA, OPRD"
ROWS = {
    "4 layers, OPRD": Row({**pruned("4-layers"), **OPRD}, (1e-3, 2e-3)),
    "4 layers, OPD full KL": Row({**pruned("4-layers"), **KL}, (5e-4, 1e-3)),
    "4 layers, OPRD + full KL": Row({**pruned("4-layers"), **BOTH}, (1e-3, 2e-3), seeds=(0,)),
    "control: 4 layers at random, OPRD": Row({**pruned("4-layers-random"), **OPRD}, (2e-3,), seeds=(0,)),
    "5 layers, OPRD": Row({**pruned("5-layers"), **OPRD}, (2e-3,), seeds=(0,)),
    "5 layers, OPD full KL": Row({**pruned("5-layers"), **KL}, (1e-3,), seeds=(0,)),
    QUANTISED: Row({**FOUR_BITS, **OPRD}, (2e-3,), seeds=(0,)),
    "fp4 + LoRA, OPD full KL": Row({**FOUR_BITS, **KL}, (2e-3,), seeds=(0,)),
    "control: fp4 + LoRA, OPRD, merged into 4 bits": Row({}, (2e-3,), seeds=(0,), run=merged),
}
UNTRAINED = {
    "teacher, 6 layers": (TEACHER, 44),
    "5 layers, no training": (str(OUT / "students" / "5-layers"), 44),
    "4 layers, no training": (str(OUT / "students" / "4-layers"), 44),
    "4 layers at random, no training": (str(OUT / "students" / "4-layers-random"), 44),
    "teacher, 4 x 64": ("miniature:teacher", 44),
    "fp4, no training": (str(OUT / "students" / "fp4"), 44),
    "nf4, no training": (str(OUT / "students" / "nf4"), 44),
}
TABLE = Table(
    OUT,
    ROWS,
    UNTRAINED,
    (2.5e-4, 8e-3),
    recorded=Path(__file__).parent / "recorded" / "compression.jsonl",
)


def one_row(name: str) -> None:
    TABLE.one_row(name)


def random_layers(keep: int) -> tuple[int, ...]:
    """The first and the last layer, and others that chance chose; never those that influence keeps."""
    chance, influence = random.Random(0), {5: (1, 2, 3, 5, 6), 4: (1, 2, 5, 6)}[keep]
    while True:
        inner = sorted(chance.sample(range(2, DEPTH), keep - 2))
        if (1, *inner, DEPTH) != influence:
            return (1, *inner, DEPTH)


def make_students() -> None:
    """Pruned by influence on the miniature's prompts and the teacher's answers to them, and at random; quantised."""
    from transformers import AutoTokenizer

    from oprd.compression.prune import Choice, Probing, prune
    from oprd.models import resolve_path

    for name, choice in (
        ("5-layers", Choice(keep=5)),
        ("4-layers", Choice(keep=4)),
        ("4-layers-random", Choice(layers=random_layers(4))),
    ):
        if not (OUT / "students" / name).exists():
            prune(TEACHER, OUT / "students" / name, choice, Probing("miniature:train.jsonl", answers=44))
    for name in ("fp4", "nf4"):
        if not (OUT / "students" / name).exists():
            _quantised("miniature:teacher", name).save_pretrained(OUT / "students" / name)
            AutoTokenizer.from_pretrained(resolve_path("miniature:teacher")).save_pretrained(OUT / "students" / name)


def _quantised(model: str, kind: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from oprd.models import resolve_path

    if find_spec("bitsandbytes") is None:
        raise SystemExit('The quantised rows need bitsandbytes: pip install "oprd[quantized]".')
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)
    return AutoModelForCausalLM.from_pretrained(resolve_path(model), quantization_config=config, use_safetensors=True)


if __name__ == "__main__":
    main(TABLE, one_row, __doc__, make_students)
