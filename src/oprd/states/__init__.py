"""Where hidden states come from: what each model reads, which positions pair up, and the forward that visits them."""

from oprd.states.alignment import align_ends
from oprd.states.attention import check_packed_attention, use_packed_attention
from oprd.states.attention_maps import AttentionObserver, check_observed_attention, use_observed_attention
from oprd.states.capture import read_one_token, visit_states
from oprd.states.crossing import Crossing
from oprd.states.packing import deal, fill, only, pack, pack_all, shared
from oprd.states.prefixes import PrefixIndex
from oprd.states.questions import Attending, Question, TeacherElsewhere, TeacherStates, answer, autocast_dtype
from oprd.states.tiling import tile_mlps
from oprd.states.views import PositionPairs, Reading, Rollout, TeacherText, make_rollout
from oprd.states.vocabulary import Vocabulary, token_byte_ends, vocabulary_of

__all__ = [
    "Attending",
    "AttentionObserver",
    "Crossing",
    "PositionPairs",
    "PrefixIndex",
    "Question",
    "Reading",
    "Rollout",
    "TeacherElsewhere",
    "TeacherStates",
    "TeacherText",
    "Vocabulary",
    "align_ends",
    "answer",
    "autocast_dtype",
    "check_observed_attention",
    "check_packed_attention",
    "deal",
    "fill",
    "make_rollout",
    "only",
    "pack",
    "pack_all",
    "read_one_token",
    "shared",
    "tile_mlps",
    "token_byte_ends",
    "use_observed_attention",
    "use_packed_attention",
    "visit_states",
    "vocabulary_of",
]
