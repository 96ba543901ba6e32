"""Push what a run has trained to the Hub: one commit or none, private unless told otherwise."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from httpx import HTTPError
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from poco_vla.errors import HubError, PocoError
from poco_vla.files import write_json
from poco_vla.hub.artifact import CARD, Artifact, Dtype, Form, Which, check_portable, head_in, source_folder, stage
from poco_vla.hub.card import Licence, model_card, title_of
from poco_vla.pretrained.heads import ABOUT, Head, read_about, sha256_of
from poco_vla.pretrained.sources import content_of, weights_in
from poco_vla.registry import load_adapter

logger = logging.getLogger(__name__)

LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "LICENCE.md", "NOTICE")


@dataclass(frozen=True)
class Pushed:
    """What went to the Hub, or would go.

    Attributes:
        repo_id: where.
        private: whether others may not see it.
        files: names and sizes in bytes.
        card: the model card.
        revision: the commit; None for a dry run.
        url: of the commit; None for a dry run.
        note: a sentence where plain samples of the policy are not how its run acted.
    """

    repo_id: str
    private: bool
    files: dict[str, int]
    card: str
    revision: str | None = None
    url: str | None = None
    note: str | None = None


def push_head(
    run: str | Path,
    repo_id: str,
    *,
    form: Form = "head",
    which: Which = "last",
    dtype: Dtype = "float32",
    critic: bool = False,
    base: str | None = None,
    license: str | None = None,
    private: bool = True,
    update: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> Pushed:
    """Upload what a finished run has trained, with its account and a model card.

    All files come in one commit, so that nobody ever sees half of it. When an upload breaks off, the same call goes on:
    large files that arrived are not sent again.

    Args:
        run: the run's folder.
        repo_id: "you/name", or "name" for your own.
        form: "head" (the head or its LoRA, for `load_head`), "peft" (the same for LeRobot alone), "policy" (a whole
            LeRobot policy). A policy without a base is always whole.
        which: the policy of the run's end, or of its best evaluation.
        dtype: "bfloat16" halves a head's file and rounds.
        critic: with the critic.
        base: Hub id of the base, for a run that had it from a local folder; its files must be the same.
        license: for a policy without a base; any other has its base's.
        private: whether a new repository is. One that holds something stays as it is.
        update: add a commit to a repository that holds such a head already.
        dry_run: upload nothing, say what would go; with a token, also whether it may go there.
        token: the Hub's; None takes the one that `hf auth login` left.

    Raises:
        HubError: no token or no right, a repository that holds something else, a base that others could not get, a file
            that would give away a secret or a path of this machine, or an upload that broke off.
        DataError: `run` is not the folder of a finished run.
    """
    from poco_vla.report import read_result  # loads pandas
    from poco_vla.report.commands import acting_note

    run, api = Path(run), HfApi(token=token)
    _check_name(repo_id)
    result = read_result(run)  # before anything is written there
    head = head_in(source_folder(run, which))
    _check_base(run, head, base, whole=form == "policy")
    knows_us = token is not None or get_token() is not None
    if not dry_run or knows_us:
        repo_id = _full_name(api, repo_id)
    place = _Place(None, private)
    with _told(f"nothing was pushed to {repo_id}"), tempfile.TemporaryDirectory(prefix=".push-", dir=run) as scratch:
        if not dry_run or knows_us:
            place = _look(api, repo_id, result["adapter"], private=private)
        folder = Path(scratch) / "artifact"
        folder.mkdir()
        there = _compared(api, run, head, base) if head and base and head.revision is None else None
        artifact = stage(run, folder, form=form, which=which, dtype=dtype, critic=critic, base=there)
        _confirm_datasets(api, artifact)
        if place.weights not in (None, artifact.about["weights"]["sha256"]) and not update:
            raise HubError(
                f"{repo_id} exists and holds what was trained already: choose another name, or add a commit to it with "
                "--update"
            )
        note = acting_note(artifact.about, str(run))
        card = model_card(artifact, repo_id, _licence(api, artifact, license))
        (folder / CARD).write_text(card)
        check_portable(folder, token=token)
        if dry_run:
            return Pushed(repo_id, place.private, artifact.files(), card, note=note)
        commit = _commit(api, repo_id, artifact, place)
        return Pushed(repo_id, place.private, artifact.files(), card, commit.oid, str(commit.commit_url), note)


def _commit(api: HfApi, repo_id: str, artifact: Artifact, place: "_Place") -> CommitInfo:
    """Everything at once; what an earlier push brought and this one does not, goes."""
    files = artifact.files()
    adds = [CommitOperationAdd(name, artifact.folder / name) for name in files]
    stale = [CommitOperationDelete(name) for name in place.pushed if name not in files]
    about = artifact.about
    title = f"{'LoRA' if about['weights']['lora'] else artifact.form.capitalize()} trained by {title_of(about)}"
    with _told("the same command goes on where it broke off: what arrived is not sent again, and no half is ever seen"):
        parent = place.commit or _made(api, repo_id, place.private)
        return api.create_commit(repo_id, [*adds, *stale], commit_message=title, parent_commit=parent)


def _made(api: HfApi, repo_id: str, private: bool) -> str:
    """The commit of a new repository, or of an empty one that an earlier push left, as visible as is asked for now."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    info = api.model_info(repo_id)
    if _held(info):
        raise HubError(f"somebody has pushed to {repo_id} meanwhile: look at it, then push again")
    if bool(info.private) != private:
        api.update_repo_settings(repo_id, private=private)
    assert info.sha is not None
    return info.sha


def _check_name(repo_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f'"{repo_id}" is no name for a repository: {error}') from error


def _full_name(api: HfApi, repo_id: str) -> str:
    """Return a repository's name, in the user's own namespace where none is given; the Hub is asked who the user is."""
    if api.token is None and get_token() is None:
        raise HubError(
            "no token for the Hub: run `hf auth login` (it needs write access) or set HF_TOKEN. --dry-run needs none"
        )
    try:
        user = api.whoami()["name"]
    except HfHubHTTPError as error:
        raise HubError(f"the Hub does not know this token: run `hf auth login` again ({_first_line(error)})") from error
    except (HTTPError, OSError) as error:
        raise HubError(f"the Hub cannot be reached ({type(error).__name__}: {_first_line(error)})") from error
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


@dataclass(frozen=True)
class _Place:
    """The repository as it is.

    Attributes:
        commit: what a push would stand on; None where there is no repository, or an empty one, as a broken-off push
            leaves it.
        private: whether others will not see it.
        weights: hash of the weights that are there: a push whose answer got lost has left the very same.
        pushed: files that an earlier push brought.
    """

    commit: str | None
    private: bool
    weights: str | None = None
    pushed: tuple[str, ...] = ()


def _look(api: HfApi, repo_id: str, adapter: str, *, private: bool) -> _Place:
    """Return what is in the repository now; raise HubError if it is somebody's or another adapter's."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return _Place(None, private)
    held = _held(info)
    if not held:
        return _Place(None, private)
    if ABOUT not in held:
        listed = ", ".join(sorted(held)[:4])
        raise HubError(f"{repo_id} exists and holds something else ({listed}; no {ABOUT}): choose another name")
    theirs = read_about(Path(api.hf_hub_download(repo_id, ABOUT, revision=info.sha)).parent)
    if theirs["adapter"] != adapter:
        raise HubError(
            f'{repo_id} holds what the adapter "{theirs["adapter"]}" has trained, and this is of "{adapter}": choose '
            "another name"
        )
    listed = theirs.get("files")
    pushed = tuple(name for name in held if name in listed) if isinstance(listed, list) else ()
    return _Place(info.sha, bool(info.private), theirs.get("weights", {}).get("sha256"), pushed)


def _held(info: ModelInfo) -> set[str]:
    """Files of a repository but the Hub's own."""
    return {file.rfilename for file in info.siblings or []} - {".gitattributes"}


def _confirm_datasets(api: HfApi, artifact: Artifact) -> None:
    """Take datasets out of the account that the Hub does not show: LeRobot's cache may hold some that were never
    pushed."""
    from huggingface_hub.utils import HFValidationError

    shown = []
    for name in artifact.about["datasets"]:
        try:
            api.dataset_info(name)
            shown.append(name)
        except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
            logger.warning("the card does not link the dataset %s, which the Hub does not show: %s", name, error)
    if shown != artifact.about["datasets"]:
        artifact.about["datasets"] = shown
        write_json(artifact.folder / ABOUT, artifact.about)


def _check_base(run: Path, head: Head | None, base: str | None, *, whole: bool) -> None:
    """Others must be able to get the base that a head belongs on."""
    if head is None or head.revision is not None:
        if base is not None and (head is None or base != head.base):
            raise HubError(f"{run} was trained on {head.base if head else 'no base'}, not on {base}: leave out --base")
    elif base is None and not whole:
        raise HubError(
            f"{run} was trained on the local folder {head.base}, which nobody else has: name the Hub repository of the "
            "same files with --base (`hf upload` puts them there), or push the whole policy: --form policy"
        )


def _compared(api: HfApi, run: Path, head: Head, base: str) -> tuple[str, str]:
    """Hub id and commit of `base`, whose weights must be the files that the run had."""
    folder = Path(head.base)
    own = weights_in(folder)
    if not own:
        raise HubError(f"{folder} is gone, so that it cannot be compared with {base}")
    if content_of(folder) != head.content:
        raise HubError(f"{folder} holds other weights than those that {run} was trained on")
    with _told(f"the base {base} cannot be compared"):
        info = api.model_info(base, files_metadata=True)
    theirs = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs}
    for file in own:
        if theirs.get(file.name) != sha256_of(file):
            found = "missing" if file.name not in theirs else f"another file than {file}"
            raise HubError(f"{base} is not the base of {run}: its {file.name} is {found}")
    assert info.sha is not None
    return base, info.sha


def _licence(api: HfApi, artifact: Artifact, chosen: str | None) -> Licence:
    """The base's, with its texts where it has some; else what the user chose."""
    terms = load_adapter(artifact.about["adapter"]).terms if artifact.derived else None
    if artifact.base is None:
        if artifact.derived and chosen is None:
            raise HubError("the licence of the base model holds for what derives from it: name it with --license")
        return Licence(chosen, terms=terms)
    if chosen is not None:
        raise HubError(f"the licence is inherited from {artifact.base}: leave out --license {chosen}")
    revision = artifact.about["base"]["revision"]
    with _told(f"the licence of {artifact.base} cannot be read"):
        info = api.model_info(artifact.base, revision=revision)
        texts = tuple(name for name in LICENCE_FILES if name in _held(info))
        for name in texts:
            shutil.copyfile(api.hf_hub_download(artifact.base, name, revision=revision), artifact.folder / name)
    data: dict[str, Any] = info.card_data.to_dict() if info.card_data else {}
    page = f"https://huggingface.co/{artifact.base}"
    if not data.get("license"):
        return Licence("other", f"that of {artifact.base}", page, terms, texts)
    link = data.get("license_link")
    if link and "://" not in link:
        link = f"{page}/blob/{revision}/{link}"
    return Licence(data["license"], data.get("license_name"), link, terms, texts)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """The Hub's and the network's errors as one that says what it means for the push."""
    try:
        yield
    except PocoError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        meaning = {
            401: "the Hub does not know this token: run `hf auth login` again",
            403: "this token may not do that: it needs write access there (and, of a gated model, its terms accepted)",
            404: "the Hub has no such repository, or does not show it to this token",
            409: "somebody made that repository a moment ago",
            412: "somebody else has pushed meanwhile: look at it, then push again",
        }.get(status, f"the Hub answered {status}")
        raise HubError(f"{meaning} ({_first_line(error)}); {what}") from error
    except ValueError as error:  # before anything of a commit is sent
        raise HubError(
            f"the Hub does not take the model card ({_first_line(error)}); is the licence one of its names, such as "
            f"apache-2.0? {what}"
        ) from error
    # No network; a part that was refused again and again; a full disk.
    except (HTTPError, RuntimeError, OSError) as error:
        raise HubError(f"{type(error).__name__}: {_first_line(error)}; {what}") from error


def _first_line(error: BaseException) -> str:
    cause = f" {_first_line(error.__cause__)}" if error.__cause__ is not None else ""
    return (str(error).strip().split("\n")[0] or type(error).__name__) + cause
