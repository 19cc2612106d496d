"""Policies on models of other libraries."""
