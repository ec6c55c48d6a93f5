"""From what a diagnosis measured to what to do: a verdict, reasons in words, and a recipe. Numbers in, words out.

The rules follow docs/results.md; each reason says what was measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

Found = Mapping[str, Any]

DIRECT, BRIDGE, OUTPUTS = "direct", "bridge", "outputs"
ENOUGH = 0.25  # share of the teacher's variance from which states carry something: as they stand, or by a linear map
NOTHING_LEFT = 1e-3  # nats of KL
ARRIVED = 0.98  # cosine from which what is missing is not in the states
ONE_LAYER = 0.8  # share of Eq. 6 that one layer makes up alone
ONE_HEAD = 0.01  # relative distance up to which two LM heads are one
UNFINISHED = 0.25  # share of answers cut off from which scores and ends say little
WHOLE_VOCABULARY = 512  # up to which output_loss: full is affordable across tokenizers

BETTER_THAN_LAST = "all were better than the last 16, where states were compared"


def verdict(files: Found, found: Found) -> str:
    """``direct``: the states mean the same; ``bridge``: they do after a linear map; ``outputs``: next-token distributions are
    all that can be compared, or the best."""
    if files["reading"] == "other tokens":
        return OUTPUTS
    explained = [layer["explained"] for layer in found["layers"] if "explained" in layer]
    if explained and median(explained) >= ENOUGH:  # one layer out of line decides nothing
        return DIRECT
    bridge = found["bridge"]
    return BRIDGE if bridge and bridge["explained"] >= ENOUGH else OUTPUTS


def mean_of(found: Found, name: str) -> float | None:
    """Mean over layers; None where widths differ."""
    values = [layer[name] for layer in found["layers"] if name in layer]
    return fmean(values) if values else None


def advise(files: Found, students: Mapping[str, Found], cut_off: float = 0.0) -> list[dict[str, str]]:
    """What to do and why, a topic each; of a run, what it changed and what is left.

    Args:
        files: ``files`` of the diagnosis.
        students: ``students`` of it, one before a run; or ``before`` and ``after`` one.
        cut_off: the share of answers that did not end.
    """
    before, after = students.get("before"), list(students.values())[-1]
    if before is not None:
        said = [_topic("states", *_moved_states(before, after)), _topic("choices", *_moved_choices(before, after))]
        said += [_topic("head", *told)] if (told := _left_to_the_head(after)) else []
        return said + _cautions(files, before, cut_off)  # a student that has caught up is no reason for one
    kind = verdict(files, after)
    said = [_topic("alignment", *_alignment(files, after, kind)), _topic("method", *_method(files, after, kind))]
    if kind == DIRECT or "bridge" in recipe_of(files, after):
        said.append(_topic("layers", *_layers(after)))
    said.append(_topic("positions", "all of them (positions: all)", _parting(after)))
    if kind == BRIDGE and after["heads"]["why_not_solved"] is None:
        said.append(_topic("rank", *_rank(after)))
    said.append(_topic("LM head", *_head(after, kind)))
    return said + _cautions(files, after, cut_off)


def recipe_of(files: Found, found: Found) -> dict[str, Any]:
    """The settings of a recipe that follow from a diagnosis; models, data and budget aside."""
    kind, heads = verdict(files, found), found["heads"]
    if kind == DIRECT:
        chosen = {"representation_weight": 1.0, "layers": "all", "positions": "all", "lm_head": "auto"}
        if _heaviest(found)[1] > ONE_LAYER:
            chosen["representation_loss"] = "normalized_mse"
        mapped = files["layer_map"] is not None and not files["pruned_from_teacher"]
        return chosen | ({"layer_map": files["layer_map"]} if mapped else {})
    if kind == BRIDGE and heads["why_not_solved"] is None:
        then = {"representation_weight": 0, "representation_loss": None, "lm_head": "keep", "output_loss": "full"}
        first = {"bridge": "auto", "bridge_rank": "full", "representation_weight": 1.0}
        return first | {"representation_loss": "normalized_mse", "lm_head": "solved", "then": then}
    foreign = files["reading"] == "other tokens"
    loss = "top_k" if foreign and files["vocabulary"][0] > WHOLE_VOCABULARY else "full"
    return {"representation_weight": 0, "output_loss": loss}


def _topic(name: str, say: str, why: str) -> dict[str, str]:
    return {"topic": name, "say": say, "why": why}


def _alignment(files: Found, found: Found, kind: str) -> tuple[str, str]:
    bridge = found["bridge"]
    linear = ""
    if bridge:
        linear = (
            f"a linear map explains {bridge['explained']:.0%} of the teacher's variance on answers that it was not fitted to "
            f"({max(bridge['explained_by_chance'], 0):.0%} by chance)"
        )
    stands = (
        "the widths differ, so states cannot be compared as they stand"
        if "cosine" not in found["layers"][0]
        else f"as they stand their cosine is {mean_of(found, 'cosine'):.2f} ({mean_of(found, 'cosine_shuffled'):.2f} for pairs by "
        f"chance), and the student's explain {max(mean_of(found, 'explained'), 0):.0%} of the teacher's variance"
    )
    if files["reading"] == "other tokens":
        return "by their text only: the tokenizers differ", (
            f"{found['paired_share']:.0%} of the student's positions end where a teacher token ends"
            + (f"; there {linear}" if linear else "")
        )
    if kind == DIRECT:
        return "directly: the hidden states mean the same", stands
    if kind == BRIDGE:
        return "through a bridge", f"{stands}; {linear}"
    return "not by their states", f"{stands}; {linear}" if linear else stands


def _method(files: Found, found: Found, kind: str) -> tuple[str, str]:
    if kind == DIRECT and _one_head(found):
        return "hidden states (OPRD)", (
            "the same origin and one LM head: in the measured runs full KL did as well (output_loss: full); hidden states need no "
            "logits"
        )
    if kind == DIRECT:
        return "hidden states (OPRD)", "the same origin: in the measured runs far ahead of next-token losses"
    if files["reading"] == "other tokens":
        loss = recipe_of(files, found)["output_loss"]
        return f"next-token distributions by prefix marginals (output_loss: {loss})", (
            "every position is supervised, also inside a teacher token; states alone would leave out "
            f"{1 - found['paired_share']:.0%} of them"
        )
    if kind == BRIDGE and found["heads"]["why_not_solved"] is None:
        return "a bridge, a solved LM head, then full KL (bridge: auto, lm_head: solved, then)", (
            "the best of what was tried between two origins; a bridge alone, under the student's own head, made the student worse at every rank"
        )
    if kind == BRIDGE:
        return "full KL (output_loss: full)", (
            f"a bridge needs an LM head that can be solved for: {found['heads']['why_not_solved']}"
        )
    if found["bridge"] is None or not found["bridge"]["enough_rows"]:
        return "full KL (output_loss: full)", "too few positions were read to say whether a linear map would do"
    return "full KL (output_loss: full)", "a linear map finds too little of the teacher's states in the student's"


def _one_head(found: Found) -> bool:
    drift = found["heads"]["drift"]
    return drift is not None and drift <= ONE_HEAD


def _heaviest(found: Found) -> tuple[int, float]:
    """The layer of the largest distance, and its share of Eq. 6."""
    distances = [layer.get("distance", 0.0) for layer in found["layers"]]
    total = sum(distances)
    return distances.index(max(distances)) + 1, (max(distances) / total if total and len(distances) > 1 else 0.0)


def _layers(found: Found) -> tuple[str, str]:
    layer, share = _heaviest(found)
    if share > ONE_LAYER:
        return "all, as directions (layers: all, representation_loss: normalized_mse)", (
            f"layer {layer} alone makes up {share:.0%} of the raw squared distance and would drown the others"
        )
    if share:
        return (
            "all (layers: all)",
            f"the largest share of the squared distance, {share:.0%}, is layer {layer}'s; none drowns the others",
        )
    return "all (layers: all)", "one map a layer" if "distance" not in found["layers"][0] else "no layer drowns another"


def _parting(found: Found) -> str:
    """Where in the answer the two part."""
    rows = [row for row in found["positions"] if "kl_first" in row]
    if not rows:
        return BETTER_THAN_LAST
    whole = rows[-1]["kl_first"]
    near = next((row for row in rows if row["kl_first"] >= whole / 2), rows[-1])
    return (
        f"the two are {whole:.3f} nats apart; over the first {near['k']} positions {near['kl_first']:.3f}, over the last "
        f"{near['k']} {near['kl_last']:.3f}. {BETTER_THAN_LAST[0].upper()}{BETTER_THAN_LAST[1:]}"
    )


def _rank(found: Found) -> tuple[str, str]:
    bridge = found["bridge"]
    why = f"Theorem 3's rule says {bridge['rank']}; under a solved head only the full rank was measured, and under the student's own higher ranks hurt less"
    return "full (bridge_rank: full)", why


def _head(found: Found, kind: str) -> tuple[str, str]:
    heads = found["heads"]
    if kind != DIRECT:
        if kind == BRIDGE and heads["why_not_solved"] is None:
            return (
                "solved in closed form (lm_head: solved)",
                "the student's own cannot read states that moved to a teacher's",
            )
        return "the student's own (lm_head: keep)", "output losses train it"
    told = _read_by_the_student(found)
    if heads["why_not_adopted"] is None and _one_head(found):
        return "one on both sides (lm_head: auto)", f"the two heads differ by {heads['drift']:.1%}"
    if heads["why_not_adopted"] is None:
        return "the teacher's (lm_head: auto adopts it)", f"the two heads differ by {heads['drift']:.1%}; {told}"
    return "the student's own, trained through the head metric (logit_weight: 1, the default here)", (
        f"{heads['why_not_adopted']}; {told}"
    )


def _read_by_the_student(found: Found) -> str:
    choices, scores = found["choices"], found.get("accuracy", {})
    told = (
        f"under the student's head the teacher's states choose its token at {choices['teacher_under_student_head/agreement']:.1%} of "
        "places"
    )
    if "teacher_under_student_head" in scores:
        told += (
            f" and solve {scores['teacher_under_student_head']['value']:.0f}%, under its own {scores['teacher']['value']:.0f}%: "
            "what states alone can reach with that head is nearer to the first"
        )
    return told


def _moved_states(before: Found, after: Found) -> tuple[str, str]:
    told, up = [], []
    for name, label in (
        ("cosine", "cosine"),
        ("explained", "share of the teacher's variance explained"),
        ("cka", "CKA"),
    ):
        was, now = mean_of(before, name), mean_of(after, name)
        if was is not None:
            told.append(f"{label} {was:.3f} to {now:.3f}")
            up.append(now > was)
    return f"{_nearer(up)} the teacher's", ", ".join(told)


def _nearer(up: list[bool]) -> str:
    """In words, from whether each measure says so."""
    return "nearer to" if all(up) else "by some measures nearer to" if any(up) else "no nearer to"


def _moved_choices(before: Found, after: Found) -> tuple[str, str]:
    names = {"kl": "KL {:.3f} to {:.3f} nats", "agreement": "agreement {:.1%} to {:.1%}"}
    told = [
        text.format(before["choices"][name], after["choices"][name])
        for name, text in names.items()
        if name in after["choices"]
    ]
    scores = [one.get("accuracy") for one in (before, after)]
    if None not in scores:
        told.append(
            f"solved {scores[0]['student']['value']:.0f} to {scores[1]['student']['value']:.0f}% (teacher "
            f"{scores[1]['teacher']['value']:.0f}%)"
        )
    up = [after["choices"]["agreement"] > before["choices"]["agreement"]]
    up += [after["choices"]["kl"] < before["choices"]["kl"]] if "kl" in after["choices"] else []
    return f"{_nearer(up)} the teacher's", ", ".join(told)


def _left_to_the_head(after: Found) -> tuple[str, str] | None:
    """The states have arrived and the head does not read them: the commonest way to a high cosine and no accuracy."""
    scores = after.get("accuracy", {})
    lent = scores.get("student_under_teacher_head")
    if lent is None or (mean_of(after, "cosine") or 0) < ARRIVED or lent["low"] <= scores["student"]["high"]:
        return None
    return "holds the student back (lm_head: auto, or logit_weight: 1 where the head is tied)", (
        f"its states have a cosine of {mean_of(after, 'cosine'):.3f}, and under the teacher's head they solve {lent['value']:.0f}%, "
        f"under its own {scores['student']['value']:.0f}%"
    )


def _cautions(files: Found, found: Found, cut_off: float) -> list[dict[str, str]]:
    said, scores = [], found.get("accuracy", {})
    if cut_off > UNFINISHED:
        said.append(
            (
                "longer answers (--max_new_tokens)",
                f"{cut_off:.0%} were cut off: what is solved, and the last k positions, are those of unfinished answers",
            )
        )
    elif scores and scores["teacher"]["value"] <= scores["student"]["high"]:
        said.append(
            (
                "the teacher may have nothing to teach here",
                f"it solves {scores['teacher']['value']:.0f}%, the student {scores['student']['value']:.0f}% "
                f"[{scores['student']['low']:.0f}, {scores['student']['high']:.0f}]"
                + (": have the two been swapped?" if scores["teacher"]["value"] < scores["student"]["low"] else ""),
            )
        )
    if not files["ends_alike"]:
        own, other = files["end_tokens"]
        said.append(
            (
                "set eos_token",
                f"the student's answers end with {own}, the teacher's with {other}: lengths would explode",
            )
        )
    if found["choices"].get("kl", 1.0) < NOTHING_LEFT:
        said.append(("the two choose alike already", f"their KL is {found['choices']['kl']:.1e} nats"))
    if found["bridge"] is None or not found["bridge"]["enough_rows"]:
        rows = 0 if found["bridge"] is None else found["bridge"]["rows"]
        said.append(
            ("more --prompts, to judge a linear map", f"{rows:,} positions are too few for states of this width")
        )
    massive = [
        f"{role} layer {n}"
        for role, layers in found["activations"].items()
        for n, one in enumerate(layers, 1)
        if one["massive"]
    ]
    if massive:
        said.append(
            (
                "read cosines without the largest dimensions",
                f"massive activations in {', '.join(massive[:4])}{' and more' if len(massive) > 4 else ''}",
            )
        )
    return [_topic("caution", *one) for one in said]
