"""What a diagnosis takes at the size of a real model, and that it does not grow with the prompts.

Two randomly initialised models of Qwen2.5-0.5B's shape (24 layers x 896, 151,936 tokens) are saved, then diagnosed in a process
of their own for each number of prompts. Prints seconds and peak memory.

    OMP_NUM_THREADS=2 python -m benchmarks.diagnose_size --prompts 8 32
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

TOKENS = 151_936
SHAPE = {
    "vocab_size": TOKENS,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}


def make_model(folder: Path, seed: int) -> None:
    """Random weights, and a tokenizer with a word for nearly every row (as Qwen2.5 has it)."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(TOKENS - 271)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0").save_pretrained(folder)


def diagnose_here(folder: Path, prompts: int, length: int) -> dict[str, float]:
    """One diagnosis in this process: seconds, peak resident memory, and positions compared."""
    from oprd.insight import Prompts, case_of_models, diagnose
    from oprd.insight.diagnosis import Settings

    case = case_of_models(
        str(folder / "student"), str(folder / "teacher"), Prompts(str(folder / "prompts.jsonl"), prompts=prompts)
    )
    settings = Settings(max_new_tokens=length, batch_size=8, dtype="float32", accuracy=False)
    record = diagnose(case, folder / f"out-{prompts}", settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"prompts": prompts, "tokens": record["answers"]["tokens"], "seconds": record["seconds"], "peak GiB": peak}


def main() -> None:
    """Make the models, diagnose, print a line for each number of prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(diagnose_here(options.folder, options.prompts[0], options.tokens)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, role in enumerate(("student", "teacher")):
            make_model(folder / role, seed)
        rows = [
            json.dumps({"prompt": f"w{10 * number} w{10 * number + 1} w2"}) for number in range(max(options.prompts))
        ]
        (folder / "prompts.jsonl").write_text("\n".join(rows))
        for count in options.prompts:
            command = [sys.executable, "-m", "benchmarks.diagnose_size", "--folder", name]
            command += ["--prompts", str(count), "--tokens", str(options.tokens)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.strip().splitlines()[-1])
            print(
                "  ".join(
                    f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in found.items()
                )
            )


if __name__ == "__main__":
    main()
