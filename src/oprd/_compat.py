"""Names that TRL and transformers do not promise to keep, imported in one place.

Tested with ``trl>=1.16,<1.17``. Each entry says what would let it go.
"""

# Builds the architecture named in the checkpoint's config; until TRL exports a public loader.
from trl.trainer.utils import RepeatSampler, create_model_from_path

# DeepSpeed inference engine for a frozen model; until accelerate's prepare_model(evaluation_mode=True) covers ZeRO-3.
from trl.models import prepare_deepspeed  # isort: skip

__all__ = ["RepeatSampler", "create_model_from_path", "prepare_deepspeed"]
