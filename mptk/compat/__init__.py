"""compat: all private names of other libraries that mptk uses. One module a library (torch has two); each has a test.

If an upgrade changes one of them, ``tests/house/test_compat.py`` fails first.
"""
