"""features: what mptk can do beyond its core, a folder each. They are found by entry points; nothing else imports one.

Each folder has all that is its own. Without a folder the rest of mptk works as before, and says which feature is
missing if somebody asks for it. docs/plugins.md says how to write one.
"""
