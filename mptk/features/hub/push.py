"""push: upload a folder that mptk wrote to a model hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from mptk.arguments import guard_arguments
from mptk.errors import OutputError
from mptk.publish.manifest import check_manifest


@guard_arguments
def push_files(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> str:
    """Upload every file of a folder that mptk wrote; returns the address of the commit.

    The repository, and the branch ``revision``, are made if missing. Files that are there and not in the folder stay.
    ``HF_ENDPOINT`` names the hub; ``hf auth login`` or ``HF_TOKEN`` gives the login.

    Args:
        folder: an ``--out`` folder of ``prune``, ``recover`` or ``export``.
        repo: OWNER/NAME.
        private: of a new repository; None: as the owner's account makes them.
        revision: the branch; None: the main one.
        message: of the commit; None: one that names the folder.
        dry_run: only check the folder, and return what would be uploaded, a line for each file. No network is needed.

    Raises:
        MptkError: the folder was not made by mptk, or changed since; or the hub refuses it or cannot be reached.
    """
    # A damaged or incomplete folder is refused before anything is made on the hub.
    folder, api = Path(folder), HfApi(library_name="mptk")
    check_manifest(folder)
    if dry_run:
        sizes = {path.relative_to(folder): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
        lines = [f"{size / 1e6:10,.1f} MB  {name}" for name, size in sizes.items()]
        total = f"{sum(sizes.values()) / 1e6:10,.1f} MB  in {len(sizes)} files would go to {api.endpoint}/{repo}"
        return "\n".join([*lines, total])
    # Each step may find its work done already, so a push that failed can be repeated.
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=message or f"Upload {folder.resolve().name} with mptk",
        )
    except Exception as error:  # errors of huggingface_hub and of its HTTP client share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OutputError(
            f"{repo} was not uploaded to {api.endpoint}: {reason}; check the name, the network and the login "
            "(`hf auth login`, or HF_TOKEN with the right to write)",
            name=repo,
        ) from error
    return str(done.commit_url)
