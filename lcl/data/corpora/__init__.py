"""Builders of real corpora."""
