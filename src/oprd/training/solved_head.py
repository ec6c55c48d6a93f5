"""The LM head in closed form: after states have moved towards the teacher's through a bridge, read them as the teacher would.

A bridge compares projections, so it never says how the student's last states should be read, and the student's old head
reads moved states worse than it read the old ones. Least squares says it: with ``h_T ~ A h_S`` over the student's own text,
``A = C_TS C_SS^-1`` from raw second moments, the teacher's logits are about ``W_T A h_S``; so ``W_S = W_T A``.
"""

from __future__ import annotations

import torch
from accelerate.logging import get_logger
from torch import nn
from tqdm.auto import tqdm

from oprd import models
from oprd.bridge.moments import Moments
from oprd.states import Question, Rollout, answer, autocast_dtype, visit_states

logger = get_logger(__name__)

PROMPTS, RIDGE = 512, 1e-8


def why_head_cannot_be_solved(student: nn.Module, teacher: nn.Module) -> str | None:
    """None if the student's head can be replaced by a solved one; otherwise the reason, in words for a user."""
    if models.is_tied(student):
        return "the student ties its head to its input embeddings, so a new head would change what it reads"
    for role, model in (("student", student), ("teacher", teacher)):
        head = models.head_of(model)
        if head.bias_V is not None or head.softcap is not None:
            return f"the {role}'s head is not one plain matrix (it has a bias or soft-caps its logits)"
    return None


def _last_states(rollout: Rollout) -> Question:
    """The teacher's last states at the output pairs."""
    places_N = rollout.output_pairs.teacher_places(rollout.teacher.ids_BS.shape[1])
    dtype = autocast_dtype(rollout.teacher.ids_BS.device)
    return Question(rollout.teacher, places_N[:0], output_places_N=places_N, dtype=dtype)


@torch.no_grad()
def solve_head(trainer, prompts: int = PROMPTS) -> float:
    """Replace the student's head by ``W_T C_TS C_SS^-1`` over its own fresh answers to ``prompts`` training prompts.

    Every process rolls out its share; all get the same head. Returns the share of the teacher's last states that the student's explain,
    ``1 - ||h_T - A h_S||^2 / ||h_T||^2``.

    Args:
        trainer: an `oprd.OPRDTrainer` with one vocabulary on both sides, after training.
    """
    accelerator, args = trainer.accelerator, trainer.args
    student = accelerator.unwrap_model(trainer.model_wrapped)
    teacher = accelerator.unwrap_model(trainer.teacher_model)
    was_training = trainer.model.training
    trainer.model.eval()
    moments = Moments.empty(
        models.text_config(student).hidden_size, models.text_config(teacher).hidden_size, accelerator.device
    )
    size = args.per_device_train_batch_size
    count = min(prompts, len(trainer.train_dataset)) // (size * accelerator.num_processes)
    quiet = args.disable_tqdm or not accelerator.is_local_main_process
    for place in tqdm(range(max(count, 1)), desc="solving the LM head", unit="batch", disable=quiet):
        trainer.check_stop()
        first = (place * accelerator.num_processes + accelerator.process_index) * size
        rows = [trainer.train_dataset[(first + i) % len(trainer.train_dataset)] for i in range(size)]
        rollout = trainer.make_rollout(trainer._generate_and_score_completions(rows))
        with accelerator.autocast():
            own = visit_states(student, rollout.student, (), lambda *_: None)[0]
            with trainer.teachers[0].at_hand():
                other_Nd = answer(teacher, _last_states(rollout)).at_outputs
        moments.update(rollout.output_pairs.of_student(own), other_Nd)
    trainer._metrics["eval"].clear()
    for name, tensor in moments.tensors().items():
        getattr(moments, name).copy_(accelerator.reduce(tensor, reduction="sum"))
    gram = moments.student_student
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    linear = torch.linalg.solve(gram, moments.student_teacher).T
    total = moments.teacher_teacher.diagonal().sum()
    explained = 2 * (linear * moments.student_teacher.T).sum() - ((linear @ moments.student_student) * linear).sum()
    vocab_size = trainer.vocab_size
    ours, theirs = models.causal_lm(student).get_output_embeddings(), models.head_of(teacher, vocab_size)
    scale = theirs.scale / models.head_of(student).scale
    ours.weight[:vocab_size].copy_((theirs.weight_Vd.double() @ linear * scale).to(ours.weight))
    trainer.model.train(was_training)
    share = (explained / total).item()
    logger.info(f"LM head solved: the student's last states explain {share:.1%} of the teacher's.")
    return share
