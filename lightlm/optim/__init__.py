"""Optimizers: their recipe sections, parameter groups and state.

This room lies below recipes, since a recipe's section `optimizer` is that of the optimizer it names. Sections and the
registry import torch only when an optimizer is built, so that reading a recipe stays fast.
"""
