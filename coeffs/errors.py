"""Errors of the registry: one line each, saying what was found, what was expected and what to do next."""


class CoeffsError(Exception):
    """Base of every expected error of ``coeffs``; ``exit_code`` is what the command line returns for it."""

    exit_code = 2


class InvalidPolynomial(CoeffsError, ValueError):
    """Coefficients, a domain or a sign rule that cannot be used."""
