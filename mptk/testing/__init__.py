"""What tests of mptk and of plugins share: tiny models, and a laboratory of folders that are made once in a test run.

In ``conftest.py``::

    pytest_plugins = ["mptk.testing.fixtures"]

and in a test::

    def test_my_target_writes_its_file(laboratory, tmp_path):
        out = laboratory.prune("decoder", tmp_path / "out", target="my-target")
        assert (out / "my-file").is_file()

    def test_my_reader_refuses_a_damaged_folder(laboratory, tmp_path):
        copy = laboratory.copy(laboratory.open_pruned("decoder"), tmp_path / "copy")
        ...

Nothing here needs a network. The fixtures need pytest, and the data of kinds needs Pillow.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
