"""Linear maps between models of different shape, origin or tokenizer: fitted in closed form, frozen, kept with a report."""

from oprd.bridge.bridge import Bridge
from oprd.bridge.fingerprint import model_fingerprint, tokenizer_fingerprint
from oprd.bridge.fit import BridgeFitter
from oprd.bridge.teacher_side import TeacherSide

__all__ = ["Bridge", "BridgeFitter", "TeacherSide", "model_fingerprint", "tokenizer_fingerprint"]
