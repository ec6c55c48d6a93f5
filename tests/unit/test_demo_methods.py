"""Every method of every demo is a recipe and settings that the command line takes."""

import pytest

from oprd.miniature.demo import DEMOS
from oprd.models import resolve_path
from oprd.training.recipe import parse

METHODS = [(which, name) for which, demo in DEMOS.items() for name in demo.methods]


@pytest.mark.parametrize(("which", "name"), METHODS)
def test_a_method_parses(which, name):
    demo = DEMOS[which]
    recipe, settings = demo.methods[name]
    arguments = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    _, args, model, *_ = parse(["--config", recipe, *arguments])
    assert model.model_name_or_path == f"miniature:{demo.student}"
    assert args.teacher_model_name_or_path == f"miniature:{demo.teacher}"
    assert args.max_completion_length == demo.max_new_tokens
    assert all(resolve_path(f"miniature:{role}") for role in (demo.student, demo.teacher))
