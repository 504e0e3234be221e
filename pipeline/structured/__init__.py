"""Answers that have a given form: token masks by grammars and choices."""
