"""features: what mptk can do beside pruning decoders, encoders and modules. Each folder is one feature.

Nothing outside of this package imports it: its parts are found by ``mptk.plugins.load_parts``. A feature whose folder
is taken away is not installed.
"""
