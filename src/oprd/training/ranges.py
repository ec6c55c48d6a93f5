"""Numbers that a setting can take: what would fail after minutes, or train nonsense, is refused at once."""

from __future__ import annotations

import math
from typing import Any

from accelerate.utils import DynamoBackend
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

# setting -> least, most, whether the least itself will do
POSITIVE, NOT_NEGATIVE, SHARE = (0, math.inf, False), (0, math.inf, True), (0, 1, True)
AT_LEAST_ONE = (1, math.inf, True)
RANGES: dict[str, tuple[float, float, bool]] = {
    "learning_rate": POSITIVE,
    "num_train_epochs": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "save_total_limit": AT_LEAST_ONE,
    "seed": NOT_NEGATIVE,
    "data_seed": NOT_NEGATIVE,
    "dataloader_num_workers": NOT_NEGATIVE,
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "max_completion_length": AT_LEAST_ONE,
    "temperature": POSITIVE,
    "top_p": (0, 1, False),
    "top_k": NOT_NEGATIVE,
    "min_p": SHARE,
    "repetition_penalty": POSITIVE,
    "vllm_server_port": (1, 65535, True),
    "vllm_group_port": (1, 65535, True),
    "vllm_server_timeout": NOT_NEGATIVE,
    "vllm_tensor_parallel_size": AT_LEAST_ONE,
    "vllm_gpu_memory_utilization": (0, 1, False),
    "lora_r": AT_LEAST_ONE,
    "lora_alpha": AT_LEAST_ONE,
    "lora_dropout": SHARE,
}
NAMED = {
    "lr_scheduler_type": [kind.value for kind in SchedulerType],
    "optim": [kind.value for kind in OptimizerNames],
    "torch_compile_backend": [kind.value.lower() for kind in DynamoBackend],
}
MAY_BE_INFINITE = ("max_grad_norm", "vllm_server_timeout")


def check_ranges(config: Any) -> None:
    """Every number of a config that has a range lies in it, and every name is one of those that there are.

    Raises:
        ValueError: the setting, its range or its names, and what it got.
    """
    for name, known in NAMED.items():
        value = getattr(config, name, None)
        if isinstance(value, str) and getattr(value, "value", value) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    for name, (least, most, inclusive) in RANGES.items():
        value = getattr(config, name, None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        inside = (least <= value if inclusive else least < value) and value <= most
        if not inside or (value == math.inf and name not in MAY_BE_INFINITE):
            raise ValueError(f"{name} must be {_words(least, most, inclusive)}, got {value}.")
    steps = getattr(config, "max_steps", None)
    if isinstance(steps, int | float) and steps < 1 and steps != -1:
        raise ValueError(f"max_steps must be at least 1, or -1 to go by num_train_epochs, got {steps}.")


def _words(least: float, most: float, inclusive: bool) -> str:
    lower = f"{'at least' if inclusive else 'more than'} {least:g}"
    return f"a number of {lower}" if most == math.inf else f"a number of {lower} and at most {most:g}"
