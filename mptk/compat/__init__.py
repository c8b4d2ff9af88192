"""compat: every private name of another library that mptk relies on, one module a library, each with a test.

An upgrade that changes one of them breaks ``tests/test_compat.py`` first.
"""
