"""A model a given number of times larger: rules, tolerance, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import InvalidRequestError
from headrace.model.catalogue import find_model
from headrace.model.scaling import TOLERANCE, scaled

NAMES = ["gpt-3", "gpt-2", "llama-3-8b", "llama-3.1-405b", "mixtral-8x7b", "deepseek-v3", "gpt-oss-20b", "palm-540b"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [0.1, 0.5, 2, 10, 1000])
def test_so_many_times_the_parameters(name: str, factor: float) -> None:
    before, after = find_model(name), find_model(f"{name}*{factor}")
    assert after.parameters / before.parameters == pytest.approx(factor, rel=TOLERANCE)
    if after.weight_format != "mxfp4":  # its experts have fewer bits than the rest, and the two grow apart
        assert after.weights_bytes / before.weights_bytes == pytest.approx(factor, rel=0.02)
    assert after.num_layers == max(1, round(before.num_layers * factor ** (1 / 3)))
    assert (after.vocab_size, after.context_tokens) == (before.vocab_size, before.context_tokens)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(NAMES), st.floats(0.05, 1e6), st.floats(0, 1))
def test_the_tolerance_holds_for_any_factor_and_share(name: str, factor: float, share: float) -> None:
    before = find_model(name)
    after = scaled(before, factor, depth_share=share)
    assert after.parameters / before.parameters == pytest.approx(factor, rel=TOLERANCE)
    assert sum(group.count for group in after.groups) == after.num_layers


def test_gpt_3_a_thousand_times_larger() -> None:
    """960 layers of ten times the width: 10 x 10 squared."""
    small, large = find_model("gpt-3"), find_model("gpt-3*1000")
    layer = next(large.layers())
    assert (large.num_layers, large.hidden_size, layer.query_heads, layer.kv_heads) == (960, 122_880, 960, 960)
    assert (layer.key_dim, layer.value_dim) == (128, 128)
    assert layer.feed_forward_parameters == 100 * next(small.layers()).feed_forward_parameters
    assert large.kv_bytes_per_token() == 100 * small.kv_bytes_per_token()
    assert large.name == "gpt-3*1000"
    assert "96 -> 960 layers" in large.notes[-1]


def test_the_rule_can_be_changed() -> None:
    deep = find_model("gpt-3*100:depth=1")
    assert (deep.num_layers, deep.hidden_size) == (9600, 12_288)
    wide = find_model("gpt-3*100:depth=0")
    assert (wide.num_layers, wide.hidden_size) == (96, 122_880)


def test_one_key_value_head_and_a_latent_stay_and_so_do_the_experts() -> None:
    assert next(find_model("palm-540b*8").layers()).kv_heads == 1
    before, after = (list(find_model(name).layers())[-1] for name in ("deepseek-v3", "deepseek-v3*8"))
    assert after.kv_elements_per_token == 576
    assert (after.num_experts, after.experts_per_token) == (256, 8)
    assert after.expert_parameters / before.expert_parameters == pytest.approx(4, rel=0.02)


def test_groups_keep_their_proportions() -> None:
    before, after = find_model("deepseek-v3"), find_model("deepseek-v3*1000")
    assert [group.count for group in before.groups] == [3, 58]
    assert [group.count for group in after.groups] == [30, 580]


def test_a_factor_of_one_changes_nothing() -> None:
    assert find_model("gpt-3*1") == find_model("gpt-3")


def test_scaling_and_a_format_together() -> None:
    made = find_model("gpt-3*10@int4")
    assert made.name == "gpt-3*10@int4"
    assert made.weights_bytes / find_model("gpt-3*10").weights_bytes == pytest.approx(4.25 / 16, rel=0.01)


@pytest.mark.parametrize("factor", ["0", "-3", "1e30", "1e-30", "nan", "inf", "-inf"])
def test_factors_that_cannot_be_meant(factor: str) -> None:
    with pytest.raises(InvalidRequestError, match="a factor lies between"):
        find_model(f"gpt-3*{factor}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpt-3*", "no factor"),
        ("gpt-3*many", "no factor"),
        ("gpt-3*2*3", "no factor"),
        ("gpt-3*10:depth=2", "depth=SHARE"),
        ("gpt-3*10:depth=nan", "depth=SHARE"),
        ("gpt-3*10:depth=", "depth=SHARE"),
        ("gpt-3*10:width=1", "depth=SHARE"),
        ("gtp-3*10", "did you mean gpt-3"),
    ],
)
def test_rules_that_cannot_be_meant(text: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        find_model(text)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_lies_between_0_and_1(share: float) -> None:
    with pytest.raises(InvalidRequestError, match="share of growth"):
        scaled(find_model("gpt-3"), 10, depth_share=share)
