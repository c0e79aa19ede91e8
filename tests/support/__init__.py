"""Helpers that tests of several folders share: small data sets, stand-ins, and comparisons with tolerances."""
