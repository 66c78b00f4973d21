"""The hub: asked once, with a short timeout, and what was downloaded before when it cannot be reached.

huggingface_hub, transformers and datasets on their own try again and again for half a minute before they give up, even
where the files are at hand. All of them are imported when the hub is needed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignment.data.rows import RawRow
from alignment.errors import UserError

HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Answer:
    """What the hub said: the commit that a revision stands for, or why it could not be asked."""

    commit: str | None
    problem: str = ""


def names_folder(path: str) -> bool:
    """Whether a path can only be a folder or file, because no hub id is written like this."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def ask(kind: Literal["model", "dataset"], repository: str, revision: str | None, place: str = "") -> Answer:
    """Asks the hub once for ``repository``.

    Args:
        kind: Of the repository.
        repository: Its id.
        revision: Branch, tag or commit; None is the newest.
        place: Begins the error: which option names the repository.

    Raises:
        UserError: It is no hub id, or the hub says that there is none or that it is not for you.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = huggingface_hub.HfApi()
    try:
        info: Any = api.repo_info(repository, repo_type=kind, revision=revision, timeout=HUB_TIMEOUT_S)
        return Answer(info.sha or revision or "main")
    except HFValidationError as error:
        raise UserError(f"{place}{repository!r} is neither a folder nor a hub id: {error}") from error
    except Exception as error:  # network errors are of the HTTP library that this version of huggingface_hub uses
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise UserError(f"{place}{repository!r} is no folder, and the hub says: {error}") from error
        return Answer(None, str(error))


def locate_model(path: str, revision: str | None) -> str:
    """``path`` if the hub has this model; the folder of an earlier download if the hub cannot be reached.

    Raises:
        UserError: The hub has no such model, or cannot be reached and the model was never downloaded.
    """
    answer = ask("model", path, revision, "model.path: ")
    if answer.commit is not None:
        return path
    import huggingface_hub

    downloaded = huggingface_hub.try_to_load_from_cache(path, "config.json", revision=revision)
    if isinstance(downloaded, str):
        return str(Path(downloaded).parent)
    raise UserError(
        f"model.path: {path!r} is no folder here, was not downloaded before, and the hub cannot be reached"
        f" ({answer.problem}); copy the model onto this machine and give the path of its folder"
    )


def load_rows(
    path: str, config: str | None, split: str | None, revision: str | None, beside: Path, files: str | None = None
) -> tuple[list[RawRow], str]:
    """The rows of a data set on the hub, and its id with configuration, split and commit.

    Without the hub, the rows that were downloaded last are used, if ``revision`` is None or their commit.

    Args:
        path: The hub id.
        config: Its configuration; None if it has one only.
        split: Its split; None if it has one only.
        revision: Branch, tag or commit; None is the newest.
        beside: Folder in which local files are looked for, for messages.
        files: Of the repository, where it says nothing of configurations; they are all one split, ``train``.

    Raises:
        UserError: There is no such data set, configuration, split or revision; or the hub cannot be reached, and the
            data set was not downloaded before.
    """
    answer = ask("dataset", path, revision)
    remedy = "download its files onto this machine and give the path of a file or folder"
    if answer.commit is None and not _was_downloaded(path, config):
        raise UserError(
            f"{path!r} is no file or folder in {beside}, was not downloaded before, and the hub cannot be reached "
            f"({answer.problem}); {remedy}"
        )
    table = _load(path, config, split, answer.commit, files)
    commit = answer.commit or Path(table.cache_files[0]["filename"]).parent.name
    if answer.commit is None and revision not in (None, commit):
        raise UserError(
            f"the hub cannot be reached ({answer.problem}), and of {path!r} commit {commit} was downloaded before, not "
            f"{revision!r}; give that commit as revision, or {remedy}"
        )
    rows = [RawRow(f"{path} {table.split}: row {number}", row) for number, row in enumerate(table.to_list(), start=1)]
    return rows, f"{path} ({table.config_name}, {table.split}) at {commit}"


def _load(path: str, config: str | None, split: str | None, commit: str | None, files: str | None) -> Any:
    """One split as a table of datasets, from the hub or, without a commit, from the cache."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        with _offline() if commit is None else nullcontext():
            found: Any = datasets.load_dataset(path, config, split=split, revision=commit, data_files=files)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load {path!r} from the hub: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        if len(found) > 1:
            raise UserError(f"{path!r} has several splits; choose one with split: {', '.join(map(str, found))}")
        found = next(iter(found.values()))
    return found


def _was_downloaded(path: str, config: str | None) -> bool:
    """Whether datasets keeps a prepared copy. It is imported, which takes seconds, only where it keeps anything."""
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets")).expanduser()
    if not (cache.is_dir() and any(cache.iterdir())):
        return False
    from datasets.naming import camelcase_to_snakecase

    *owner, name = path.split("/")
    folder = cache / "___".join([*owner, camelcase_to_snakecase(name)])
    return any(folder.glob(f"{config or '*'}/*/*/"))


@contextmanager
def _offline() -> Iterator[None]:
    """The library takes what it has instead of trying for half a minute; it reads this switch at each call."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
