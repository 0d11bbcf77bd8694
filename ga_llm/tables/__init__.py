"""Experiments as YAML: the chain of scripts behind a row of a table, and the tables of what was measured."""
