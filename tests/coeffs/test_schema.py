"""The entry as dataclasses: what construction refuses, the order of coefficients, the schema number."""

import dataclasses

import numpy as np
import pytest
from coeffs_samples import sample_entry, two_experts

import coeffs
from coeffs.entry import schema
from coeffs.entry.fields import plain
from coeffs.entry.schema import from_plain
from coeffs.errors import EntryError


def test_fits_are_found_by_expert_and_branch():
    entry = sample_entry()
    assert entry.label == "longcat-image@v0"
    assert entry.fit(branch="uncond").coefficients_high_to_low == (0.25, 0.0625)
    assert entry.fit() is entry.fit(branch="cond") is entry.fit(branch="positive")
    assert two_experts().fit("transformer_2").degree == 2
    with pytest.raises(
        EntryError, match="no expert 'transformer_2': expected one of transformer"
    ):
        entry.fit("transformer_2")
    ratios_only = dataclasses.replace(
        entry.experts["transformer"], branches={}, recommended=None
    )
    with pytest.raises(EntryError, match="only mag_ratios or plans"):
        sample_entry(experts={"transformer": ratios_only}).fit()


def test_a_fit_gives_its_polynomial_with_domain_and_rule():
    polynomial = sample_entry().fit().polynomial("abs")
    assert polynomial.raw(2.0) == 0.5 * 8 - 0.25 * 4 + 2 / 3 + 0.125
    assert (polynomial.domain, polynomial.sign_rule) == ((0.01, 0.4), "abs")


def test_numbers_of_other_libraries_become_plain_ones():
    fit = coeffs.Fit(
        coefficients_high_to_low=np.array([1.5, 2.5]),
        domain=np.array([0, 1]),
        counts={"pairs": np.int64(3)},
    )
    assert [
        type(value)
        for value in (*fit.coefficients_high_to_low, *fit.domain, fit.counts.pairs)
    ] == [float] * 4 + [int]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "a/b/c"}, "model: the text 'a/b/c': expected a name"),
        ({"model": "con."}, "model: the text"),
        (
            {"status": "vendored"},
            "status: the text 'vendored': expected measured, published, copied",
        ),
        ({"status": None}, "status: nothing: expected"),
        ({"signal": ["modulated_input"]}, "signal: a list: expected"),
        ({"experts": {}}, "experts: no expert"),
        (
            {"experts": {"transformer": {}}, "plans": None},
            r"experts.transformer: no fit, no mag_ratios and no plan",
        ),
        ({"experts": {"trans former": {}}}, "a name of letters, digits"),
        ({"version": -1}, "version: -1: expected 0 to"),
        ({"version": 2**60}, "beyond 2"),
        (
            {"thresholds": [{"threshold": -0.1, "kind": "replay"}]},
            r"thresholds\[0\].threshold: -0.1: expected 0 to",
        ),
        ({"thresholds": [{"threshold": 0.1}]}, r"thresholds\[0\]: missing key kind"),
        ({"thresholds": {"threshold": 0.1}}, "thresholds: a mapping: expected a list"),
        (
            {"plans": [{"schedule": "CCSC", "computed_steps": 2}]},
            "2, but the schedule computes 3",
        ),
        (
            {"protocol": {"num_steps": True}},
            "protocol.num_steps: True: expected a whole number",
        ),
        ({"protocol": {"shift": [1]}}, "protocol.shift: a list: expected a number or text"),
        (
            {"protocol": {"call_arguments": {"f": object()}}},
            "protocol.call_arguments.f: <object",
        ),
        (
            {"source": {"log_sha256": "abc"}},
            "source.log_sha256: the text 'abc': expected 64 hexadecimal digits",
        ),
        ({"notes": "x" * 9000}, "notes: text of 9000 characters"),
        ({"notes": "\ud800"}, "notes: text with a lone surrogate"),
        ({"schema": 3}, "schema: 3: expected 1"),
        (
            {"checkpoint": "org/name"},
            "checkpoint: the text 'org/name': expected a mapping of repository",
        ),
    ],
)
def test_construction_refuses_what_a_file_may_not_hold(changes, message):
    with pytest.raises(EntryError, match=message):
        sample_entry(**changes)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [float("nan")],
        [float("inf")],
        [1e31],
        [1.0] * 8,
        ["1"],
        [True],
        "12",
        None,
        5,
        np.float64(5),
        {1.0},
    ],
)
def test_coefficients_that_cannot_be_used(values):
    with pytest.raises(EntryError):
        coeffs.Fit(coefficients_high_to_low=values)


# --- the order of coefficients --------------------------------------------------------------------------------------


def fitted_entries() -> list[coeffs.Entry]:
    """All but those that hold magnitude ratios only."""
    return [entry for entry in coeffs.entries() if entry.signal != "none"]


def test_every_reversed_list_in_a_file_is_refused():
    """A reversed list never engaged the cache in a published implementation; here it cannot be loaded.

    The stored value at x = 0.1 tells the two orders apart for every set, and the error says so.
    """
    refused = 0
    for entry in fitted_entries():
        data = plain(entry)
        fit = data["experts"]["transformer"]["branches"]["pooled"]
        fit["coefficients_high_to_low"].reverse()
        with pytest.raises(EntryError, match=r"value_at_0p1: .* reversed order"):
            from_plain(data)
        refused += 1
    assert refused >= 67


def test_a_changed_coefficient_is_refused_too():
    data = plain(sample_entry())
    data["experts"]["transformer"]["branches"]["cond"]["coefficients_high_to_low"][1] += 1e-6
    with pytest.raises(EntryError, match="one of the two was changed"):
        from_plain(data)


def test_a_reversed_list_without_a_stored_value_is_refused_where_it_is_implausible():
    """The second line of defence, for imports and lists typed by hand: changes above 3 everywhere on the domain."""
    every = [entry.fit() for entry in fitted_entries()]
    for fit in every:
        coeffs.Fit(
            coefficients_high_to_low=fit.coefficients_high_to_low, domain=fit.domain
        )  # the right order passes
    refused = 0
    for fit in every:
        try:
            coeffs.Fit(
                coefficients_high_to_low=fit.coefficients_high_to_low[::-1],
                domain=fit.domain,
            )
        except EntryError as error:
            assert "looks lowest power first" in str(error)
            refused += 1
    assert refused >= 45, refused


def test_a_key_that_hides_the_order_is_refused():
    for key in ("coefficients", "coefficients_low_to_high", "coeffs_coefficients"):
        data = plain(sample_entry())
        fit = data["experts"]["transformer"]["branches"]["cond"]
        fit[key] = fit.pop("coefficients_high_to_low")
        with pytest.raises(EntryError, match="highest power first"):
            from_plain(data)


# --- schema numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [-1, 0, schema.SCHEMA + 1, "1", None, True, [1]])
def test_another_schema_is_refused(number):
    with pytest.raises(EntryError, match="schema"):
        from_plain({**plain(sample_entry()), "schema": number})
