"""`mptk push` against a hub on loopback that records what it is sent."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from commands import done, refused
from forks import start_fork, wait_for_code

from mptk.errors import ChangedError, FileError, OutputError
from mptk.features.hub.push import push_files
from mptk.publish.manifest import write_manifest
from mptk.testing import expect_error

CARD = "---\nlicense: mit\nbase_model: me/dense\ntags:\n- pruned\n---\n\n# A card\n"
FILES = {"README.md", "config.json", "mptk.json", "onnx/model.onnx"}


class Hub(ThreadingHTTPServer):
    """Keeps the files of a commit and the bodies of other requests by path.

    ``refuses``: paths answered with 403. ``stalls``: it reads half of a commit, says so by ``stalled``, and waits.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.summary, self.refuses = "", ""
        self.stalls, self.stalled = False, threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({"sha": "0" * 40, "id": "me/small", "siblings": []})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        if self.server.stalls and "/commit/" in self.path:
            self.rfile.read(length // 2)
            self.server.stalled.set()
        body = self.rfile.read(length)
        if self.server.stalls and "/commit/" in self.path:
            return  # whoever sent it was killed
        if self.server.refuses and self.server.refuses in self.path:
            self.answer({"error": "you may not write here"}, 403)
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.summary = line["value"]["summary"]
                else:
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.server.asked[self.path] = {}
            self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.url}/me/small/commit/1"})
        else:
            asked = self.server.asked[self.path] = json.loads(body or b"{}")
            paths = [file["path"] for file in asked.get("files", [])]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.answer({"files": files, "url": f"{self.server.url}/me/small", "name": "me/small", "warnings": []})

    def answer(self, content: object, status: int = 200) -> None:
        said = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)


@pytest.fixture
def hub(monkeypatch, inside):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    inside.bound("huggingface_hub.constants.ENDPOINT", server.url)
    inside.bound("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the server is here
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "small"
    (made / "onnx").mkdir(parents=True)
    (made / "README.md").write_text(CARD)
    (made / "config.json").write_text("{}")
    (made / "onnx" / "model.onnx").write_bytes(b"graph")
    write_manifest(made)
    return made


def test_every_file_of_the_folder_is_uploaded_also_to_a_private_repository_a_branch_and_with_a_message(hub, folder):
    run = done("push", str(folder), "me/small")
    assert "/me/small/commit/" in run.stdout
    assert set(hub.files) == FILES
    assert hub.files["onnx/model.onnx"] == b"graph"
    assert "small" in hub.summary
    assert "private" not in hub.asked["/api/repos/create"]
    assert any(path.endswith("/commit/main") for path in hub.asked)
    push_files(folder, "me/small", private=True, revision="v2", message="cut by a third")
    created = hub.asked["/api/repos/create"]
    assert created.get("private") is True or created.get("visibility") == "private"
    assert {"/api/models/me/small/branch/v2", "/api/models/me/small/commit/v2"} <= set(hub.asked)
    assert hub.summary == "cut by a third"


def test_a_folder_that_changed_or_is_not_ours_is_not_sent(hub, folder, tmp_path):
    (folder / "config.json").write_text("{ }")
    with expect_error(ChangedError, name="config.json"):
        push_files(folder, "me/small")
    (tmp_path / "other").mkdir()
    for other in (tmp_path / "other", "a" * 300):
        with expect_error(FileError):
            push_files(other, "me/small")
    assert not hub.asked


def test_a_refusal_names_the_repository(hub, folder):
    hub.refuses = "/commit/"
    with expect_error(OutputError, name="me/small"):
        push_files(folder, "me/small")
    hub.refuses = ""
    with expect_error(OutputError, name="me/../x"):
        push_files(folder, "me/../x")
    hub.shutdown()
    hub.server_close()  # it cannot be reached any more
    with expect_error(OutputError, name="me/small"):
        push_files(folder, "me/small")
    assert not hub.files


def test_a_push_that_is_killed_sends_all_or_nothing_and_can_be_repeated(hub, folder):
    hub.stalls = True
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    sending = start_fork(lambda: push_files(folder, "me/small"))
    assert hub.stalled.wait(60)
    os.kill(sending, signal.SIGKILL)
    assert wait_for_code(sending) == -signal.SIGKILL
    assert not hub.files
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    hub.stalls = False
    push_files(folder, "me/small")
    assert set(hub.files) == FILES


def test_a_dry_run_lists_the_files_and_sends_nothing(hub, folder):
    result = done("push", str(folder), "me/small", "--dry-run")
    assert [line.split()[-1] for line in result.stdout.splitlines()[:-1]] == sorted(FILES)
    assert result.stdout.splitlines()[-1].endswith(f"in 4 files would go to {hub.url}/me/small")
    assert not hub.asked
    (folder / "config.json").write_text("{ }")
    assert refused("push", folder, "me/small", "--dry-run")
