"""Strict reading and canonical writing: what YAML would let slip is an error with its line; every float survives."""

import itertools
import math
import os
import string
import time

import pytest
import yaml
from coeffs_samples import sample_entry, two_experts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import coeffs
from coeffs.entry import strict_yaml
from coeffs.errors import CoeffsError, EntryError

HOSTILE_DOCUMENTS = int(os.environ.get("TEACAL_HOSTILE_DOCUMENTS", "1000"))
CPU_SECONDS = 1.0
TEXT = coeffs.dump(sample_entry())


def error_of(text: str | bytes) -> EntryError:
    with pytest.raises(EntryError) as caught:
        coeffs.loads(text, "entry.yaml")
    assert str(caught.value).isprintable()
    return caught.value


@pytest.mark.parametrize(
    ("old", "new", "line_of", "expected"),
    [
        (
            "num_steps: 28\n",
            "num_steps: 28\n  num_steps: 28\n",
            None,
            "duplicate key 'num_steps'",
        ),
        (
            "status: measured",
            "statu: measured",
            "statu",
            "unknown key: did you mean status?",
        ),
        ("status: measured", "status: yes", "status", "YAML reads yes as a boolean"),
        (
            "status: measured",
            "status: Measured",
            "status",
            "expected measured, published, copied",
        ),
        (
            "guidance_scale: 4.5",
            "guidance_scale: 4.98e02",
            "guidance_scale",
            "write 498.0 without quotes",
        ),
        (
            "guidance_scale: 4.5",
            "guidance_scale: 1e-3",
            "guidance_scale",
            "YAML 1.1 reads 1e-3 as text",
        ),
        (
            "guidance_scale: 4.5",
            'guidance_scale: "4.5"',
            "guidance_scale",
            "the text '4.5': expected a number",
        ),
        (
            "guidance_scale: 4.5",
            "guidance_scale: .inf",
            "guidance_scale",
            "expected finite decimals",
        ),
        (
            "guidance_scale: 4.5",
            "guidance_scale: .nan",
            "guidance_scale",
            "expected finite decimals",
        ),
        (
            "guidance_scale: 4.5",
            "guidance_scale: 1.0e+999",
            "guidance_scale",
            "expected finite decimals",
        ),
        (
            "guidance_scale: 4.5",
            "guidance_scale: 1.0e+40",
            "guidance_scale",
            "finite number of at most 1e+30",
        ),
        (
            "guidance_scale: 4.5",
            "guidance_scale: 1:30",
            "guidance_scale",
            "expected finite decimals",
        ),
        (
            "num_steps: 28\n  g",
            "num_steps: 0x1c\n  g",
            "num_steps",
            "expected finite decimals",
        ),
        (
            "num_steps: 28\n  g",
            "num_steps: 28.0\n  g",
            "num_steps",
            "28.0: expected a whole number",
        ),
        (
            "num_steps: 28\n  g",
            "num_steps: true\n  g",
            "num_steps",
            "True: expected a whole number",
        ),
        ("num_steps: 28\n  g", "num_steps: 0\n  g", "num_steps", "0: expected 1 to 10000"),
        (
            "revision: abc123",
            "revision: 2026-11-21",
            "revision",
            "YAML reads 2026-11-21 as a date",
        ),
        (
            "revision: abc123",
            "revision: 1.10",
            "revision",
            "1.1: expected text; put it in quotes",
        ),
        ("revision: abc123", "revision: &a abc", "revision", "an anchor or alias"),
        (
            "revision: abc123",
            "revision: !!str abc",
            "revision",
            "the tag 'tag:yaml.org,2002:str'",
        ),
        (
            "revision: abc123",
            "revision: !!python/object/apply:os.system [id]",
            "revision",
            "tags are never followed",
        ),
        ("revision: abc123", "revision: {a: 1}", "revision", "a mapping: expected text"),
        (
            "model: longcat-image",
            "model: ../../etc/passwd",
            "model",
            "expected a name such as longcat-image",
        ),
        (
            "model: longcat-image",
            "model: LongCat",
            "model",
            "expected a name such as longcat-image",
        ),
        (
            "schema: 1",
            "schema: 2",
            "schema",
            "this version reads schema 1; upgrade the toolkit",
        ),
        (
            "recommended: cond",
            "recommended: pooled",
            "recommended",
            "expected one of the branches cond, uncond",
        ),
        ("degree: 3", "degree: 4", "degree", "but 4 coefficients have degree 3"),
        ("domain: [0.01, 0.4]", "domain: [0.4, 0.01]", None, "expected [x_min, x_max]"),
        ("domain: [0.01, 0.4]", "domain: [0.01]", "domain", "1 values: expected 2"),
        (
            "schedule: CCSC",
            "schedule: CCXC",
            "schedule",
            "letters C (compute) and S (skip)",
        ),
        (
            "coefficients_high_to_low:",
            "coefficients:",
            None,
            "highest power first (numpy.polyfit's order)",
        ),
        (
            "max_skips: 4",
            "start: 1.5",
            "start",
            "a fraction of the schedule from 0.0 to 1.0",
        ),
        (
            "status: measured",
            "status: copied",
            None,
            "only a copied entry says from whom, and must",
        ),
    ],
    ids=itertools.count(),
)
def test_every_slip_is_named_with_its_line(old, new, line_of, expected):
    assert old in TEXT
    text = TEXT.replace(old, new, 1)
    error = error_of(text)
    assert expected in str(error)
    assert str(error).startswith("entry.yaml:")
    if line_of is not None:
        lines = [
            number
            for number, line in enumerate(text.splitlines(), 1)
            if line.lstrip(" -{").startswith(line_of)
        ]
        assert error.line in lines, (error.line, str(error))


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", 1, "empty document"),
        ("# only a comment\n", 1, "empty document"),
        ("- 1\n", 1, "expected a mapping"),
        ("model: x\n", 1, "missing key schema"),
        ("schema: true\n", 1, "True: this version reads schema 1"),
        ("schema: 1\nmodel: x\n", 1, "missing key status"),
        ("a: 1\n---\nb: 1\n", 2, "a second document"),
        ("%YAML 1.1\n---\nschema: 1\n", 1, "a %YAML or %TAG directive"),
        ("a: &x [1]\nb: *x\n", 1, "an anchor or alias"),
        ("a: 1\n<<: {b: 1}\n", 2, "a merge key"),
        ("no: 1\n", 1, "YAML reads no as a boolean"),
        ("? [1, 2]\n: 3\n", 1, "a key that is not text"),
        ("1: 2\n", 1, "a key that is not text"),
        ("a: [1,\n", None, "not YAML"),
        ("a: \t- 1\n b: 2", 1, "not YAML"),
        ("[" * 3000, 1, "nested deeper"),
        ("{a: " * 3000, 1, "nested deeper"),
        ("- " * 3000, 1, "nested deeper"),
        ("a: [" + "1, " * 60_000 + "]", 1, "more than 20000 values"),
        ("a: " + "x" * 300_000, None, "more than 262144 bytes"),
        (b"model: caf\xe9\n", 1, "is not UTF-8"),
        (b"\xff\xfe" + "schema: 1".encode("utf-16-le"), 1, "is not UTF-8"),
        ("a: \x00", None, "not YAML"),
        ("a: \ud800", None, "a lone surrogate"),
    ],
    ids=itertools.count(),
)
def test_documents_that_are_no_entry(text, line, expected):
    error = error_of(text)
    assert expected in str(error)
    assert line is None or error.line == line


def test_the_billion_laughs_stop_at_the_first_anchor():
    levels = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 20))
    assert "an anchor or alias" in str(error_of(f"l0: &l0 [lol]\n{levels}\n"))


def test_code_in_tags_never_runs(tmp_path):
    witness = tmp_path / "ran"
    for tag in (
        "!!python/object/apply:os.system",
        "!!python/object/new:os.system",
        "!!python/object/apply:eval",
    ):
        error_of(f"schema: 1\nmodel: {tag} ['touch {witness}']\n")
    assert not witness.exists()


def test_the_python_parser_reads_the_same_as_the_fast_one(monkeypatch):
    fast = strict_yaml.parse(TEXT)
    monkeypatch.setattr(strict_yaml, "_LOADER", yaml.SafeLoader)
    assert strict_yaml.parse(TEXT) == fast
    assert coeffs.loads(TEXT) == sample_entry()
    assert "nested deeper" in str(error_of("[" * 3000))


def test_the_writing_is_the_identity_after_reading():
    for entry in (sample_entry(), two_experts(), *coeffs.entries()):
        text = coeffs.dump(entry)
        assert coeffs.loads(text) == entry
        assert coeffs.dump(coeffs.loads(text)) == text


def test_other_yaml_readers_read_the_written_text_alike():
    """A plain PyYAML user sees numbers as floats, text as text: no reader needs our rules to read our files."""
    for entry in (sample_entry(), *coeffs.entries()):
        assert yaml.safe_load(coeffs.dump(entry)) == strict_yaml.parse(coeffs.dump(entry))


FLOATS = st.floats(min_value=-1e30, max_value=1e30, allow_nan=False)


@settings(max_examples=400, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_round_trips_exactly(value):
    text = strict_yaml.format_float(value)
    for read in (strict_yaml.parse(f"a: {text}\n")["a"], yaml.safe_load(text)):
        assert isinstance(read, float)
        assert (read, math.copysign(1, read)) == (value, math.copysign(1, value))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(FLOATS, min_size=1, max_size=7),
    st.floats(0, 1e3),
    st.floats(1e-3, 1e3),
    st.text(max_size=200),
    st.dictionaries(
        st.text(string.ascii_letters, min_size=1, max_size=9),
        st.none() | FLOATS | st.text(max_size=20) | st.booleans(),
    ),
)
def test_dump_load_dump_is_the_identity(coefficients, low, width, text, arguments):
    fit = (
        coeffs.Fit(
            coefficients_high_to_low=coefficients,
            domain=(low, low + width),
            value_at_0p1=None,
            figures={"r2": None, "a.b": 1.0},
        )
        if _plausible(coefficients, (low, low + width))
        else coeffs.Fit(coefficients_high_to_low=[0.0])
    )
    entry = sample_entry(
        experts={"transformer": {"recommended": "no", "branches": {"no": fit}}},
        notes=text,
        protocol={"call_arguments": arguments},
    )
    written = coeffs.dump(entry)
    assert coeffs.loads(written) == entry
    assert coeffs.dump(coeffs.loads(written)) == written


def _plausible(coefficients: list[float], domain: tuple[float, float]) -> bool:
    """Neither refused as reversed nor too large at x = 0.1."""
    try:
        coeffs.Fit(coefficients_high_to_low=coefficients, domain=domain)
        return True
    except EntryError:
        return False


# --- hostile documents ----------------------------------------------------------------------------------------------

SNIPPETS = st.sampled_from(
    [
        *(
            "&a ",
            "*a",
            "*b ",
            "!!python/object/apply:os.system [id]",
            "!!binary aGk=",
            "!!set {a}",
            "! ",
            "!!float ",
            "<<: *a\n",
        ),
        *(
            "[",
            "]",
            "{",
            "}",
            "[[[[",
            "{{{{",
            "- ",
            "? ",
            ": ",
            "|",
            ">-",
            "%YAML 9.9\n",
            "%TAG ! x\n",
            "---\n",
            "...\n",
            "#",
            "\t",
        ),
        *(
            "1e999",
            "-.inf",
            ".NaN",
            "0x10",
            "0o17",
            "017",
            "1:30:00",
            "2001-01-01",
            "~",
            "no",
            "On",
            "1_000",
            "9" * 400,
            "4.98e02",
        ),
        *(
            '"',
            "'",
            '"\\x',
            '"\\ud800"',
            "\x00",
            "\x07",
            "\u2028",
            "\ufeff",
            "\U0001f600",
            "\x85",
            "é" * 50,
            "\n",
            "\r",
            "\n    ",
        ),
        *(
            "model: x\n",
            "schema: 0\n",
            "status: copied\n",
            "experts: []\n",
            "experts: {a: {}}\n",
            "thresholds: {}\n",
            "domain: 1\n",
        ),
        *(
            "coefficients_high_to_low: [1, 2]\n",
            "a: " * 60,
            "- " * 60,
            "[" * 60,
            "&a [" + "*a, " * 30,
            "x" * 500,
        ),
    ]
)
MUTATED = st.lists(
    st.tuples(st.integers(0, len(TEXT)), st.integers(0, 40), SNIPPETS),
    min_size=1,
    max_size=6,
).map(lambda edits: _edited(TEXT, edits))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["schema", "model", "status", "experts", "x"]), inner
        )
    ),
    max_leaves=12,
)
REPLACED = st.tuples(st.sampled_from(sorted(strict_yaml.parse(TEXT))), VALUES).map(
    lambda change: yaml.dump(
        {**strict_yaml.parse(TEXT), change[0]: change[1]}, allow_unicode=True
    )
)
DOCUMENTS = st.one_of(
    MUTATED,
    MUTATED.map(lambda text: text.encode("utf-8", "surrogatepass")[: len(text) // 2]),
    REPLACED,
    VALUES.map(lambda value: yaml.dump(value, allow_unicode=True)),
    st.text(max_size=300),
    st.binary(max_size=300),
)


def _edited(text: str, edits: list[tuple[int, int, str]]) -> str:
    for place, deleted, inserted in edits:
        text = text[:place] + inserted + text[place + deleted :]
    return text


@pytest.mark.slow
@settings(
    max_examples=HOSTILE_DOCUMENTS, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(DOCUMENTS)
def test_a_hostile_document_is_an_entry_or_the_typed_error(document):
    """Any other exception, code that runs or more than a second of CPU would be a way into whoever loads an entry."""
    begun = time.process_time()
    try:
        coeffs.loads(document)
    except CoeffsError as error:
        assert isinstance(error, EntryError)
        assert str(error).isprintable()
    assert time.process_time() - begun < CPU_SECONDS
