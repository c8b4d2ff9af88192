"""parts: what FEATURE names. This module is imported only when it is used."""

import json
import zipfile
from pathlib import Path

from transformers import AutoConfig

from mptk.io import Loader
from mptk.protocols import OpenRow, Stage

from . import LabelSettings


class ZippedLoader(Loader):
    endings = (".zip",)
    conversion = 1

    def read_config(self, path, trust):
        with zipfile.ZipFile(path) as archive:
            return AutoConfig.for_model(**json.loads(archive.read("config.json")))

    def convert(self, path, folder):
        folder.mkdir()
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if Path(name).suffix in (".json", ".safetensors"):  # no code, and no path out of the folder
                    (folder / Path(name).name).write_bytes(archive.read(name))


class Label(Stage):
    def describe(self, compiled):
        label = LabelSettings.of(compiled.prepared.settings).label
        return {"label": {"text": label}} if label else {}


class LabelRow(OpenRow):
    text: str


ZIPPED, LABEL = ZippedLoader(), Label()
