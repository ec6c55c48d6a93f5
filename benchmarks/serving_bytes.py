"""Bytes of a question and its answer between a run and a teacher elsewhere, as they are written, for a realistic shape.

python -m benchmarks.serving_bytes
"""

from __future__ import annotations

import argparse
import json

import torch

from oprd.bridge import TeacherSide
from oprd.serving.wire import expected, write_answer, write_question
from oprd.states import Question, Reading, TeacherStates


def measure(
    *, documents: int, prompt: int, response: int, depth: int, width: int, rank: int | None, head: bool
) -> dict:
    """One packed micro-batch under bf16 autocast: all of ``depth`` layers at all response positions, through a bridge of
    ``rank`` or as they are; with ``head`` the last layer at all of them too, for an output loss."""
    length = prompt + response
    ids = torch.zeros(1, documents * length, dtype=torch.long)
    reading = Reading(ids, ids.bool(), torch.arange(length).repeat(documents)[None], (length,) * documents)
    places = (torch.arange(documents * length).view(documents, length)[:, prompt - 1 : -1]).flatten()
    through = None if rank is None else TeacherSide(torch.zeros(depth, rank, width), torch.zeros(depth, width))
    layers = {} if depth == 0 else {layer: layer for layer in range(1, depth + 1)}
    question = Question(
        reading, places, layers, through, output_places_N=places if head else None, dtype=torch.bfloat16
    )
    asked, _ = write_question(question)
    wanted = expected(question, width, torch.bfloat16)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, (shape, _) in wanted.items()}
    states = {int(name.removeprefix("layers.")): t for name, t in tensors.items() if name.startswith("layers.")}
    answered = write_answer(TeacherStates(states, None, tensors.get("at_outputs")))
    return {
        "layers": depth,
        "numbers a state": rank or width,
        "output loss": head,
        "positions": len(places),
        "question bytes": len(asked),
        "answer bytes": len(answered),
        "answer bytes a position": round(len(answered) / len(places), 1),
        "bridge bytes, once": 0 if through is None else len(through.content()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=36, help="layers compared (default: %(default)s)")
    parser.add_argument("--width", type=int, default=4096, help="width of the teacher (default: %(default)s)")
    options = parser.parse_args()
    shape = {"documents": 2, "prompt": 256, "response": 512, "width": options.width}
    for rank, depth, head in (
        (8, options.depth, False),
        (64, options.depth, False),
        (None, options.depth, False),
        (None, 0, True),
    ):
        print(json.dumps(measure(**shape, depth=depth, rank=rank, head=head)))
