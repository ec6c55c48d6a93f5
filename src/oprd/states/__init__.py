"""Where hidden states come from: what each model reads, which positions pair up, and the forward that visits them."""

from oprd.states.capture import visit_states
from oprd.states.views import PositionPairs, Reading, Rollout, same_tokens

__all__ = ["PositionPairs", "Reading", "Rollout", "same_tokens", "visit_states"]
