"""Measurements of holdfast beside other tools, run from the root of a checkout.

The wheel does not carry them: they import the peers that holdfast is measured against.
"""
