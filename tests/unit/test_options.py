"""The table behind ``--help`` says what the config and the functions take."""

from dataclasses import fields

from oprd import OPRDConfig
from oprd.training.options import CHOICES, HELP, MAY_BE_OPEN


def test_every_option_is_explained_and_every_choice_an_option():
    own = {field.name: field for field in fields(OPRDConfig)}
    assert set(HELP) - {"resume"} <= set(own)
    assert set(CHOICES) <= set(HELP)
    for name, allowed in CHOICES.items():
        assert own[name].default in allowed or (name in MAY_BE_OPEN and own[name].default is None)
        assert len(set(allowed)) == len(allowed)
    for name in set(HELP) - {"resume"}:
        assert own[name].metadata["help"] % {} == HELP[name]  # as argparse will print it


def test_every_setting_of_a_fit_and_of_the_data_is_explained():
    from oprd.training.bridging import BridgeConfig
    from oprd.training.options import BENCHMARK_HELP, BRIDGE_HELP, DATA_HELP
    from oprd.training.recipe import DataConfig
    from oprd.training.validation import BenchmarkConfig

    assert set(BRIDGE_HELP) == {field.name for field in fields(BridgeConfig)}
    assert set(BENCHMARK_HELP) == {field.name for field in fields(BenchmarkConfig)}
    assert set(DATA_HELP) | {"resume", "then"} == {field.name for field in fields(DataConfig)}


def test_the_defaults_that_are_told_are_those_of_the_classes():
    from oprd.training.bridging import BridgeConfig
    from oprd.training.options import BENCHMARK_HELP, BRIDGE_HELP, DATA_HELP, DEFAULTS, default_of
    from oprd.training.recipe import DataConfig
    from oprd.training.validation import BenchmarkConfig

    told = {*HELP, *DATA_HELP, *BRIDGE_HELP, *BENCHMARK_HELP}
    classes = (OPRDConfig, DataConfig, BridgeConfig, BenchmarkConfig)
    whole = {field.name: field.default for owner in classes for field in fields(owner) if field.name in told}
    assert {name: value for name, value in whole.items() if value is not None} == DEFAULTS
    as_told = [default_of(name) for name in ("resume", "bridge_ridge", "layers", "bridge", "representation_weight")]
    assert as_told == ["false", "1e-08", "all", "", "1"]


def test_choices_agree_with_the_functions_that_take_them():
    from oprd.objectives import LAYER_WEIGHTINGS, REPRESENTATION_KINDS, TRANSITION_OVER
    from oprd.objectives.output_space import TOP_K_SUPPORTS
    from oprd.objectives.reduction import REDUCTIONS
    from oprd.objectives.selection import POSITION_SPECS
    from oprd.states.views import STATE_AT

    assert CHOICES["representation_loss"] == (*REPRESENTATION_KINDS, "transition")
    assert CHOICES["transition_over"] == TRANSITION_OVER
    assert CHOICES["layer_weighting"] == LAYER_WEIGHTINGS
    assert CHOICES["top_k_support"] == TOP_K_SUPPORTS
    assert CHOICES["reduction"] == REDUCTIONS
    assert CHOICES["positions"] == (*POSITION_SPECS, "adaptive")
    assert CHOICES["state_at"] == STATE_AT
