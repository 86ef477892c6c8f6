"""Throw-away processes that touch what may crash: a new model file, a quantisation."""
