"""A2D: turn an autoregressive language model into a diffusion language model.

Start with `a2d_core.models.load` and `a2d_core.sampling.generate`, or with `python -m a2d_core --help`.
"""
