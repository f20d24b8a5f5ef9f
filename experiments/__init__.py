"""Finished experiments that the model cards report; run from a checkout, not installed."""
