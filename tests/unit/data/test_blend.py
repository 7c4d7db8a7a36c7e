"""From mixtures to weights of prefixes: the numbers, and what Megatron would misunderstand."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import get_blend_from_list

from megatron_mergemix.config import Domain
from megatron_mergemix.data import blend as blend_module
from megatron_mergemix.data.blend import (
    blend_arguments,
    blend_of,
    check_prefix,
    domain_prefix_weights,
    domain_tokens,
    epochs,
)
from megatron_mergemix.errors import BlendError, DataError


def dataset(prefix: Path, lengths: list[int]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint8)
    for length in lengths:
        builder.add_document(np.ones(length), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, str]:
    """Four datasets of 800, 200, 500 and 100 tokens in sequences of 10."""
    sizes = {"a": 800, "b": 200, "c": 500, "tiny": 100}
    return {name: dataset(tmp_path / name, [10] * (size // 10)) for name, size in sizes.items()}


@pytest.fixture
def domains(shards: dict[str, str]) -> dict[str, Domain]:
    return {
        "math": Domain(prefixes=[shards["a"], shards["b"]]),
        "code": Domain(prefixes={shards["c"]: 3.0, shards["tiny"]: 1.0}),
    }


def test_a_list_is_weighted_by_tokens_and_a_mapping_as_given(
    domains: dict[str, Domain], shards: dict[str, str]
) -> None:
    assert domain_prefix_weights(domains["math"], "1,0,0") == {shards["a"]: 0.8, shards["b"]: 0.2}
    assert domain_prefix_weights(domains["code"], "1,0,0") == {
        shards["c"]: 0.75,
        shards["tiny"]: 0.25,
    }


def test_tokens_are_those_of_the_training_part(tmp_path: Path) -> None:
    # Half of the sequences, but not half of the tokens.
    front, back = dataset(tmp_path / "f", [30, 10]), dataset(tmp_path / "b", [10, 30])
    domain = Domain(prefixes=[front, back])
    assert domain_prefix_weights(domain, "50,50,0") == {front: 0.75, back: 0.25}
    assert domain_tokens(domain, "50,50,0") == 40
    assert domain_tokens(domain, "1,0,0") == 80


def test_shares_of_domains_are_spread_over_their_prefixes(
    domains: dict[str, Domain], shards: dict[str, str]
) -> None:
    assert blend_of({"math": 0.6, "code": 0.4}, domains, "1,0,0") == [
        (0.48, shards["a"]),
        (0.12, shards["b"]),
        (0.3, shards["c"]),
        (0.1, shards["tiny"]),
    ]


def test_the_order_is_that_of_the_domains_not_of_the_mixture(domains: dict[str, Domain]) -> None:
    forward = blend_of({"math": 0.6, "code": 0.4}, domains, "1,0,0")
    assert blend_of({"code": 0.4, "math": 0.6}, domains, "1,0,0") == forward


@pytest.mark.parametrize("mixture", [{"math": 1.0}, {"math": 1.0, "code": 0.0}])
def test_a_domain_without_a_share_is_left_out(
    domains: dict[str, Domain], shards: dict[str, str], mixture: dict[str, float]
) -> None:
    assert blend_of(mixture, domains, "1,0,0") == [(0.8, shards["a"]), (0.2, shards["b"])]


def test_a_domain_without_a_share_need_not_exist(shards: dict[str, str]) -> None:
    domains = {"a": Domain(prefixes=[shards["a"]]), "gone": Domain(prefixes=["/nowhere"])}
    assert blend_of({"a": 1.0}, domains, "1,0,0") == [(1.0, shards["a"])]
    with pytest.raises(DataError, match="/nowhere"):
        blend_of({"a": 0.5, "gone": 0.5}, domains, "1,0,0")


def test_equal_prefixes_are_added_within_and_across_domains(
    shards: dict[str, str], tmp_path: Path
) -> None:
    for ending in (".bin", ".idx"):
        (tmp_path / f"link{ending}").symlink_to(shards["a"] + ending)
    (tmp_path / "x").mkdir()
    roundabout, link = str(tmp_path / "x" / ".." / "a"), str(tmp_path / "link")
    domains = {
        "one": Domain(prefixes=[shards["a"], roundabout, shards["b"]]),
        "two": Domain(prefixes=[link, shards["c"]]),
    }
    given = Domain(prefixes={shards["a"]: 1.0, link: 2.0, shards["b"]: 1.0})
    assert domain_prefix_weights(given, "1,0,0") == {shards["a"]: 0.75, shards["b"]: 0.25}
    assert domain_prefix_weights(domains["one"], "1,0,0") == {shards["a"]: 0.8, shards["b"]: 0.2}
    got = blend_of({"one": 0.5, "two": 0.5}, domains, "1,0,0")
    assert [prefix for _, prefix in got] == [shards["a"], shards["b"], shards["c"]]
    expected = [0.4 + 0.5 * 800 / 1300, 0.1, 0.5 * 500 / 1300]
    assert [weight for weight, _ in got] == pytest.approx(expected, abs=1e-6)


# ---- rounding ----


def units(blend: list[tuple[float, str]]) -> list[int]:
    return [round(weight * 1e6) for weight, _ in blend]


@given(
    st.lists(
        st.one_of(st.floats(0.01, 1), st.floats(1e-12, 1e-5), st.just(1.0)), min_size=1, max_size=40
    )
)
def test_rounded_weights_sum_to_one_and_none_is_zero(raw: list[float]) -> None:
    total = math.fsum(raw)
    shares = [share / total for share in raw]
    rounded = blend_module._rounded(shares, 6)
    counts = [round(weight * 1e6) for weight in rounded]
    assert sum(counts) == 10**6
    assert min(counts) >= 1
    assert [count / 1e6 for count in counts] == rounded
    lifted = sum(share < 1e-6 for share in shares)
    for share, weight in zip(shares, rounded, strict=True):
        # Nearest multiple, except that lifted shares are paid for by the largest ones.
        assert abs(weight - share) <= 1e-6 * (1 + lifted) + 1e-15
    assert all(
        rounded[i] <= rounded[j] + 1.1e-6
        for i in range(len(shares))
        for j in range(len(shares))
        if shares[i] < shares[j]
    )


def test_a_third_each_is_rounded_by_largest_remainder(tmp_path: Path) -> None:
    domains = {name: Domain(prefixes=[dataset(tmp_path / name, [5])]) for name in ("a", "b", "c")}
    assert units(blend_of(dict.fromkeys(domains, 1 / 3), domains, "1,0,0")) == [
        333334,
        333333,
        333333,
    ]


def test_a_tiny_share_is_lifted_to_one_millionth(domains: dict[str, Domain]) -> None:
    blend = blend_of({"math": 1 - 1e-9, "code": 1e-9}, domains, "1,0,0")
    assert units(blend) == [799999, 199999, 1, 1]


@pytest.mark.parametrize("rare", [1e-4, 2.5e-4, 5.5e-4])
def test_many_small_shards_keep_the_share_of_their_domain(tmp_path: Path, rare: float) -> None:
    """By millionths each shard of ``rare`` would get 0.5, 1.25 or 2.75 units: 1, 1 or 2, or 3."""
    shards = [dataset(tmp_path / f"{number}", [5]) for number in range(400)]
    domains = {
        "rare": Domain(prefixes=shards[:200]),
        "other": Domain(prefixes=shards[200:]),
        "web": Domain(prefixes=[dataset(tmp_path / "web", [5])]),
    }
    blend = blend_of({"rare": rare, "other": 0.0012, "web": 0.9988 - rare}, domains, "1,0,0")
    weights = [weight for weight, _ in blend]
    assert sum(weights[:200]) == pytest.approx(rare, rel=0.01)
    assert sum(weights[200:400]) == pytest.approx(0.0012, rel=0.01)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
    assert get_blend_from_list(blend_arguments(blend))[1] == weights


def test_weights_are_written_with_six_decimals_or_those_they_need() -> None:
    blend = [(1e-6, "/a"), (0.999998, "/b"), (2.5e-7, "/c"), (7.5e-7, "/d"), (1e-12, "/e")]
    assert blend_arguments(blend)[::2] == [
        *("0.000001", "0.999998", "0.00000025", "0.00000075", "0.000000000001"),
    ]


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-7, 1), min_size=1),
    st.sampled_from([6, 9, 12]),
)
def test_what_is_written_is_what_megatron_parses(raw: dict[str, float], decimals: int) -> None:
    blend = list(
        zip(blend_module._rounded([*raw.values()], decimals), (f"/d/{k}" for k in raw), strict=True)
    )
    prefixes, weights = get_blend_from_list(" ".join(blend_arguments(blend)).split())
    assert prefixes == [prefix for _, prefix in blend]
    assert weights == [weight for weight, _ in blend]


# ---- what is refused ----


@pytest.mark.parametrize("prefix", ["my data", "a\tb", "a\n", "", "\u00a0x"])
def test_white_space_in_a_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(BlendError, match="white space"):
        check_prefix(prefix)


@pytest.mark.parametrize("prefix", ["1", "1e5", "nan", "inf", "0.5", "1_000", "-x", "--split"])
def test_a_prefix_that_reads_as_weight_or_option_is_refused(prefix: str) -> None:
    with pytest.raises(BlendError, match=r"Write it as \./"):
        check_prefix(prefix)
    check_prefix(f"./{prefix}")


def test_a_numeric_prefix_is_refused_in_a_blend_where_megatron_takes_it_for_a_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get_blend_from_list(["1", "2"]) == (["2"], [1.0])
    monkeypatch.chdir(tmp_path)
    dataset(tmp_path / "1", [5])
    with pytest.raises(BlendError, match="'1' would be taken"):
        blend_of({"a": 1.0}, {"a": Domain(prefixes=["1"])}, "1,0,0")
    assert blend_of({"a": 1.0}, {"a": Domain(prefixes=["./1"])}, "1,0,0") == [(1.0, "./1")]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"math": 0.5, "kode": 0.5}, "names kode, expected domains: math, code"),
        ({"math": 1.2, "code": -0.2}, "share of code is -0.2"),
        ({"math": math.nan, "code": 1.0}, "share of math is nan"),
        ({"math": math.inf}, "share of math is inf"),
        ({"math": 0.5, "code": 0.4}, "sum to 0.9, expected 1"),
        ({}, "sum to 0, expected 1"),
    ],
)
def test_what_is_no_mixture_is_refused(
    domains: dict[str, Domain], mixture: dict[str, float], message: str
) -> None:
    with pytest.raises(BlendError, match=message):
        blend_of(mixture, domains, "1,0,0")


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_within_a_domain_that_is_none_is_refused(
    shards: dict[str, str], weight: float
) -> None:
    domain = Domain.model_construct(prefixes={shards["a"]: 1.0, shards["b"]: weight})
    with pytest.raises(BlendError, match=f"weight of {shards['b']} is"):
        domain_prefix_weights(domain, "1,0,0")


def test_a_prefix_without_training_tokens_cannot_have_a_weight(
    shards: dict[str, str], tmp_path: Path
) -> None:
    # One sequence, cut at a tenth of it: nothing is left for training.
    single = dataset(tmp_path / "single", [50])
    by_tokens = Domain(prefixes=[shards["a"], single])
    assert domain_prefix_weights(by_tokens, "1,9,0") == {shards["a"]: 1.0}
    given_weights = Domain(prefixes={shards["a"]: 0.5, single: 0.5})
    with pytest.raises(BlendError, match="single has weight 0.5, but no tokens in the training"):
        domain_prefix_weights(given_weights, "1,9,0")
    with pytest.raises(BlendError, match="no prefix of the domain has both a weight and tokens"):
        domain_prefix_weights(Domain(prefixes=[single]), "1,9,0")


def test_one_prefix_more_than_megatron_counts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blend_module, "MAX_PREFIXES", 2)
    domain = Domain(prefixes=[dataset(tmp_path / name, [5]) for name in "abc"])
    with pytest.raises(BlendError, match="has 3 prefixes, but Megatron takes at most 2"):
        blend_of({"x": 1.0}, {"x": domain}, "1,0,0")
    assert len(blend_of({"x": 1.0}, {"x": Domain(prefixes=domain.prefixes[:2])}, "1,0,0")) == 2  # type: ignore[index]


# ---- epochs ----


def test_epochs_are_drawn_tokens_over_training_tokens(domains: dict[str, Domain]) -> None:
    got = epochs({"math": 0.6, "code": 0.4}, domains, "50,50,0", 2000)
    assert got == pytest.approx({"math": 0.6 * 2000 / 500, "code": 0.4 * 2000 / 300})
    assert epochs({"code": 1.0}, domains, "1,0,0", 600) == {"math": 0.0, "code": 1.0}


def test_megatron_takes_exactly_as_many_prefixes_as_we_allow() -> None:
    from megatron.core.datasets import blended_dataset

    source = Path(blended_dataset.__file__).read_text()
    assert f"len(datasets) < {blend_module.MAX_PREFIXES + 1}" in source


def test_relative_prefixes_are_kept_as_written(
    shards: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(os.path.dirname(shards["a"]))
    domains = {"x": Domain(prefixes=["a", "./b"])}
    assert blend_of({"x": 1.0}, domains, "1,0,0") == [(0.8, "a"), (0.2, "./b")]
