import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from oprd.bridge import Bridge, BridgeFitter, model_fingerprint, tokenizer_fingerprint
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

WEIGHTS, DESCRIPTION = "bridge.safetensors", "bridge.json"
FITTED_FOR = {"student": "5" * 32, "teacher": "7" * 32}
L, R, S, T = 3, 4, 6, 8


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((L, R, S), (L, S), (L, R, T), (L, T))
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def bridge_of(*, intercept=True, **changes):
    names = ("student_maps", "student_means", "teacher_maps", "teacher_means")
    settings = {"layer_map": [1, 3, 5], **dict(zip(names, tensors(), strict=True)), **changes}
    if not intercept:
        settings["student_means"] = None
    return Bridge(**settings)


@pytest.fixture
def fitted():
    """A bridge as a fit makes it, with a whole report."""
    fitter = BridgeFitter([1, 3, 5], S, T)
    fitter.update(torch.randn(L, 60, S), torch.randn(L, 60, T))
    fitter.update(torch.randn(L, 30, S), torch.randn(L, 30, T), held_out=True)
    bridge = fitter.fit(rank=R, facts={"data": {"student": "größe", "temperature": 0.7}})
    bridge.fitted_for = dict(FITTED_FOR)
    return bridge


def assert_same(one, other):
    """All values, bit by bit."""
    assert one.layer_map == other.layer_map
    for layer in range(1, len(one.layer_map) + 1):
        for side, width in (("student", S), ("teacher", T)):
            rows = torch.cat([torch.zeros(1, width), torch.eye(width), torch.randn(5, width)])
            found, expected = (getattr(bridge, f"project_{side}")(layer, rows) for bridge in (one, other))
            assert found.equal(expected)


# ------------------------------------------------------------------------------------------------ projections


@pytest.mark.parametrize("intercept", [True, False])
def test_projections_are_eq_12_and_13(intercept):
    bridge, (maps, means, directions, teacher_means) = bridge_of(intercept=intercept), tensors()
    student, teacher = torch.randn(2, 5, S), torch.randn(2, 5, T)
    for layer in range(L):
        own, other = bridge.project_student(layer + 1, student), bridge.project_teacher(layer + 1, teacher)
        assert own.shape == other.shape == (2, 5, R)
        for b in range(2):
            for s in range(5):
                start = student[b, s] - means[layer] if intercept else student[b, s]
                torch.testing.assert_close(own[b, s], maps[layer] @ start)
                torch.testing.assert_close(other[b, s], directions[layer] @ (teacher[b, s] - teacher_means[layer]))


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,)])
def test_projections_keep_the_leading_shape(shape):
    assert bridge_of().project_student(1, torch.randn(*shape, S)).shape == (*shape, R)
    assert bridge_of().project_teacher(1, torch.randn(*shape, T)).shape == (*shape, R)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_small_floats_are_projected_in_float32(given, expected):
    bridge, student, teacher = bridge_of(), torch.randn(5, S).to(given), torch.randn(5, T).to(given)
    own, other = bridge.project_student(2, student), bridge.project_teacher(2, teacher)
    assert own.dtype == other.dtype == expected
    assert own.equal(bridge.project_student(2, student.to(expected)))
    assert other.equal(bridge.project_teacher(2, teacher.to(expected)))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_autocast_does_not_reach_a_projection(side):
    """The teacher's forward runs under the training's autocast; its targets must not be rounded to bf16."""
    rows = torch.randn(5, {"student": S, "teacher": T}[side])
    project = getattr(bridge_of(), f"project_{side}")
    expected = project(1, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = project(1, rows)
    assert found.dtype == torch.float32
    assert found.equal(expected)


def test_gradients_reach_the_states_only():
    given = [tensor.requires_grad_() for tensor in tensors()]
    bridge = Bridge([1, 3, 5], *given)
    states = torch.randn(5, S, requires_grad=True)
    weight = torch.randn(5, R)
    (bridge.project_student(2, states) * weight).sum().backward()
    torch.testing.assert_close(states.grad, weight @ given[0][1].detach())
    assert not bridge.project_student(2, torch.randn(5, S)).requires_grad
    assert not bridge.project_teacher(2, torch.randn(5, T)).requires_grad
    assert all(tensor.grad is None for tensor in given)


@pytest.mark.parametrize("layer", [0, 4, -1])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_layers_that_are_not_there(layer, side):
    with pytest.raises(ValueError, match=rf"layers 1\.\.3 of the student, not {layer}"):
        getattr(bridge_of(), f"project_{side}")(layer, torch.randn(2, {"student": S, "teacher": T}[side]))


def test_wrong_widths():
    with pytest.raises(ValueError, match="takes student states of width 6, not 8"):
        bridge_of().project_student(1, torch.randn(2, T))
    with pytest.raises(ValueError, match="takes teacher states of width 8, not 6"):
        bridge_of().project_teacher(1, torch.randn(2, S))


def test_truncate_keeps_the_first_dimensions(fitted):
    rows, others = torch.randn(5, S), torch.randn(5, T)
    for rank in range(1, R + 1):
        cut = fitted.truncate(rank)
        assert cut.rank == rank
        torch.testing.assert_close(cut.project_student(2, rows), fitted.project_student(2, rows)[:, :rank])
        torch.testing.assert_close(cut.project_teacher(2, others), fitted.project_teacher(2, others)[:, :rank])
        assert cut.report["rank"]["taken"] == rank
        assert cut.fitted_for == fitted.fitted_for
    assert fitted.rank == fitted.report["rank"]["taken"] == R


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_truncate_refuses(rank):
    with pytest.raises(ValueError, match=rf"rank 4 to rank {rank}; choose 1\.\.4"):
        bridge_of().truncate(rank)


@pytest.mark.parametrize("intercept", [True, False])
def test_to_another_device(intercept):
    bridge = bridge_of(intercept=intercept, report={"rank": {"taken": R}}, fitted_for=FITTED_FOR)
    moved = bridge.to("cpu")
    assert_same(moved, bridge)
    assert (moved.report, moved.fitted_for) == (bridge.report, bridge.fitted_for)


def test_repr_names_the_shape():
    assert repr(bridge_of()) == "Bridge(rank=4, student 3 layers x 6, teacher x 8, layer_map=[1, 3, 5])"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_map": [1, 2]}, r"student_map has shape \(3, 4, 6\), expected \(2, 4, 6\)"),
        ({"student_means": torch.zeros(L, S + 1)}, r"student_mean has shape \(3, 7\), expected \(3, 6\)"),
        ({"teacher_maps": torch.zeros(L, R + 1, T)}, r"teacher_map has shape \(3, 5, 8\), expected \(3, 4, 8\)"),
        ({"teacher_means": torch.zeros(L + 1, T)}, r"teacher_mean has shape \(4, 8\), expected \(3, 8\)"),
        ({"student_maps": torch.full((L, R, S), torch.nan)}, "student_map holds values that are not finite"),
        ({"student_means": torch.full((L, S), torch.inf)}, "student_mean holds values that are not finite"),
        ({"teacher_maps": torch.full((L, R, T), -torch.inf)}, "teacher_map holds values that are not finite"),
        ({"teacher_means": torch.full((L, T), torch.nan)}, "teacher_mean holds values that are not finite"),
    ],
)
def test_tensors_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        bridge_of(**changes)


# ------------------------------------------------------------------------------------------------ on disk


def test_round_trip_is_exact(fitted, tmp_path):
    folder = tmp_path / "a" / "bridge"
    fitted.save_pretrained(folder)
    again = Bridge.from_pretrained(str(folder))
    assert_same(again, fitted)
    assert again.report == fitted.report
    assert again.fitted_for == FITTED_FOR
    assert repr(again) == repr(fitted)
    assert sorted(path.name for path in folder.iterdir()) == [DESCRIPTION, WEIGHTS]
    again.save_pretrained(tmp_path / "copy")
    for name in (WEIGHTS, DESCRIPTION):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("intercept", [True, False])
def test_round_trip_with_and_without_an_intercept(intercept, dtype, tmp_path):
    names = ("student_maps", "student_means", "teacher_maps", "teacher_means")
    cast = {name: tensor.to(dtype) for name, tensor in zip(names, tensors(), strict=True)}
    bridge = bridge_of(**{**cast, "intercept": intercept})
    bridge.save_pretrained(tmp_path)
    again = Bridge.from_pretrained(tmp_path)
    assert_same(again, bridge)
    assert (again.report, again.fitted_for) == ({}, {})
    assert again.project_student(1, torch.zeros(S)).eq(0).all().item() is not intercept


def test_slices_and_transposes_are_saved_as_they_are(tmp_path):
    turned = tensors()[0].transpose(1, 2).contiguous().transpose(1, 2)
    bridge = bridge_of(student_maps=turned).truncate(2)
    bridge.save_pretrained(tmp_path)
    assert_same(Bridge.from_pretrained(tmp_path), bridge)


def test_saving_again_replaces(fitted, tmp_path):
    fitted.save_pretrained(tmp_path)
    fitted.truncate(2).save_pretrained(tmp_path)
    assert Bridge.from_pretrained(tmp_path).rank == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [DESCRIPTION, WEIGHTS]


def test_half_a_save_is_refused(fitted, tmp_path):
    """Weights of one bridge beside the description of another."""
    fitted.save_pretrained(tmp_path / "one")
    bridge_of().save_pretrained(tmp_path / "two")
    (tmp_path / "one" / WEIGHTS).write_bytes((tmp_path / "two" / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match=r"bridge\.safetensors is truncated or was changed"):
        Bridge.from_pretrained(tmp_path / "one")


@pytest.mark.parametrize("missing", [[WEIGHTS], [DESCRIPTION], [WEIGHTS, DESCRIPTION]])
def test_missing_files(fitted, missing, tmp_path):
    fitted.save_pretrained(tmp_path)
    for name in missing:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"no bridge in .*{' and '.join(missing)} missing.*oprd bridge fit"):
        Bridge.from_pretrained(tmp_path)


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no bridge in .*nowhere"):
        Bridge.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights(fitted, kept, tmp_path):
    fitted.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"bridge\.safetensors is truncated .*oprd bridge fit"):
        Bridge.from_pretrained(tmp_path)


def test_edited_weights(fitted, tmp_path):
    """One bit of one number."""
    fitted.save_pretrained(tmp_path)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"bridge\.safetensors .*was changed since it was written"):
        Bridge.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 2},
        {"layer_map": [1, 2, 5]},
        {"fitted_for": {}},
        {"intercept": None},
        {"weights_sha256": "0" * 64},
        {"sha256": "0" * 64},
        {"more": 1},
    ],
)
def test_an_edited_description(fitted, change, tmp_path):
    fitted.save_pretrained(tmp_path)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps(description | change))
    with pytest.raises(ValueError, match=r"bridge\.json was changed since it was written.*oprd bridge fit"):
        Bridge.from_pretrained(tmp_path)


def test_a_description_that_was_only_reformatted_is_read(fitted, tmp_path):
    fitted.save_pretrained(tmp_path)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps(dict(reversed(description.items()))))
    assert_same(Bridge.from_pretrained(tmp_path), fitted)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"{}", b"\xff\xfe\x00"])
def test_descriptions_that_are_none(fitted, content, tmp_path):
    fitted.save_pretrained(tmp_path)
    (tmp_path / DESCRIPTION).write_bytes(content)
    with pytest.raises(ValueError, match=r"bridge\.json is not a bridge's description"):
        Bridge.from_pretrained(tmp_path)


@pytest.mark.parametrize("other", [2, "1", None])
def test_other_formats(fitted, other, tmp_path):
    fitted.save_pretrained(tmp_path)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps(description | {"format": other}))
    with pytest.raises(ValueError, match=f"has format {other!r}; this version reads 1"):
        Bridge.from_pretrained(tmp_path)


def test_a_report_with_numbers_for_names_can_be_read_again(tmp_path):
    """JSON turns them into text, whose order is another; the seal must not mind."""
    bridge = bridge_of(report={"by_rank": {2: 0.5, 10: 0.25}})
    bridge.save_pretrained(tmp_path)
    assert Bridge.from_pretrained(tmp_path).report == {"by_rank": {"2": 0.5, "10": 0.25}}


# ------------------------------------------------------------------------------------------------ whose it is


def test_fitted_for(fitted):
    fitted.check_fitted_for(FITTED_FOR)
    fitted.check_fitted_for({"teacher": "7" * 32})
    fitted.check_fitted_for({"student_tokenizer": "1" * 32})  # a role that the bridge does not know
    with pytest.raises(ValueError, match=r"another teacher: 7{32}, not 9{32}.*oprd bridge fit"):
        fitted.check_fitted_for({"student": "5" * 32, "teacher": "9" * 32})
    with pytest.raises(ValueError, match="another student tokenizer: a, not b"):
        bridge_of(fitted_for={"student_tokenizer": "a"}).check_fitted_for({"student_tokenizer": "b"})


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_a_model_is_itself(architecture):
    prints = {model_fingerprint(tiny_model(architecture)) for _ in range(2)}
    prints.add(model_fingerprint(tiny_model(architecture).eval().requires_grad_(False)))
    (only,) = prints
    assert len(only) == 32
    assert set(only) <= set("0123456789abcdef")


def test_dtype_does_not_matter(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    loaded = [
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert [next(model.parameters()).dtype for model in loaded] == [torch.bfloat16, torch.float32]
    assert model_fingerprint(loaded[0]) == model_fingerprint(loaded[1]) == model_fingerprint(tiny_model())


def test_every_weight_counts():
    model = tiny_model(layers=2)
    before = model_fingerprint(model)
    for parameter in model.parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter += 1.0
            assert model_fingerprint(model) != before
            parameter.copy_(kept)
    assert model_fingerprint(model) == before


def test_other_models_differ():
    models = [
        tiny_model(),
        tiny_model(seed=1),
        tiny_model(layers=2),
        tiny_model(width=24),
        tiny_model("llama"),
        tiny_model(tied=True),
    ]
    assert len({model_fingerprint(model) for model in models}) == len(models)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        *((architecture, {}) for architecture in sorted(ARCHITECTURES)),
        ("qwen3", {"use_dora": True}),
        ("qwen3", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_adapters_do_not_count(architecture, settings):
    base = model_fingerprint(tiny_model(architecture))
    wrapped = get_peft_model(tiny_model(architecture), LoraConfig(r=2, target_modules="all-linear", **settings))
    with torch.no_grad():
        for parameter in wrapped.parameters():  # as training would
            if parameter.requires_grad:
                parameter += 1.0
    assert model_fingerprint(wrapped) == base
    assert model_fingerprint(tiny_model(architecture, seed=1)) != base


def test_a_tokenizer_is_itself(tmp_path):
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    assert before == tokenizer_fingerprint(tiny_tokenizer())
    tokenizer(["ab", "c"], padding="max_length", max_length=7, truncation=True)  # these switches stay set
    assert json.loads(tokenizer.backend_tokenizer.to_str())["padding"] is not None
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(transformers.AutoTokenizer.from_pretrained(tmp_path)) == before


@pytest.mark.parametrize("special", [False, True])
def test_an_added_token_is_another_tokenizer(special):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"], special_tokens=special)
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(tiny_tokenizer())
