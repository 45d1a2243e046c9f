"""Predicted seconds of a MoE layer and of a step. Pure: numbers in, seconds out.

`profile` and `records` say what the hardware does, `shape` what a layer or model asks
of it; `layer` and `step` put the two together.
"""
