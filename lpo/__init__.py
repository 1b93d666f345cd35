"""Preference Lab's machine learning: latent reward models (LRM) and latent preference optimisation (LPO).

Usable without the app: `python -m lpo --help`. Importing this package imports no torch.
"""
