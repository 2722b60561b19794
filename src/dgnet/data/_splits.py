"""Names of splits: which subfolder of a data folder is for training, and which one for evaluation."""

from __future__ import annotations

import re
from pathlib import Path

from dgnet.data._ledger import subfolders
from dgnet.errors import UsageError
from dgnet.paths import is_folder

TRAIN, EVALUATION = "train", "evaluation"
NAMES = {
    TRAIN: ("train", "training"),
    EVALUATION: ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""For each role the names of its split, in any case (`Train`, `VAL`). The test split is used on request only."""

_BEFORE = ("val", "validation", "test")  # the names that runs without data.json were evaluated on, in this order


def find_splits(root: Path) -> dict[str, list[Path]]:
    """The subfolders of `root` by role; none if it is not divided into splits.

    It is divided if it holds a training folder with class folders, or nothing but splits of which one has class folders. (A
    class called train holds images.)
    """
    folders = subfolders(root)
    found: dict[str, list[Path]] = {
        role: [folder for folder in folders if folder.name.lower() in names] for role, names in NAMES.items()
    }
    splits = [folder for role in found.values() for folder in role]
    decisive = splits if len(splits) == len(folders) else found[TRAIN]
    if not any(subfolders(folder) for folder in decisive):
        return {}
    return {role: split for role, split in found.items() if split}


def split_folder(root: Path, role: str, as_before: bool = False) -> Path:
    """The folder of `root` for `role`: `root` itself if it is not divided into splits.

    `as_before`: choose the evaluation folder of a run without data.json, whose version knew fewer names and took test/ too.

    Raises UsageError if there is no such folder, or more than one. A test folder is never chosen.
    """
    found = find_splits(root)
    if not found:
        folders = [folder.name for folder in subfolders(root)]
        splits = [name for name in folders if any(name.lower() in known for known in NAMES.values())]
        if len(splits) == len(folders) > 1:
            raise UsageError(
                f"{root} holds the splits {', '.join(splits)}, which hold no class folders; a data folder looks like"
                f" {root}/{splits[0]}/CLASS/IMAGE.jpg"
            )
        if not as_before:
            _refuse_similar_names(root, folders)
        return root
    if role == EVALUATION and as_before:
        for name in _BEFORE:
            if is_folder(root / name):
                return root / name
    own = found.get(role, [])
    if len(own) == 1:
        return own[0]
    option = "--data" if role == TRAIN else "--val-data (dgnet evaluate: --data)"
    if own:
        names = " and ".join(f"{folder.name}/" for folder in own)
        raise UsageError(f"{root} holds both {names}; name the one to use, as in {option} {own[0]}")
    allowed = ", ".join(f"{name}/" for name in NAMES[role])
    holds = ", ".join(f"{folder.name}/" for folders in found.values() for folder in folders)
    if role == TRAIN:
        raise UsageError(
            f"{root} holds {holds} but no training folder ({allowed}); name the folder itself, as in --data {root}/…"
        )
    if "test" in found:
        raise UsageError(
            f"{root} holds {holds} but no validation folder ({allowed}), and a test folder is used on request only: give"
            f" {option} {found['test'][0]}, or evaluate on training images with --holdout N"
        )
    raise UsageError(
        f"{root} holds {holds} but no validation folder ({allowed}); give the evaluation data with {option},"
        " or evaluate on training images with --holdout N"
    )


def _refuse_similar_names(root: Path, folders: list[str]) -> None:
    """Raises UsageError if all folders are called like splits, as train2017 and val2017 or train_images and test_images are."""
    words = [re.match("[a-z]*", name.lower())[0] for name in folders]  # type: ignore[index]
    roles = [next((role for role, names in NAMES.items() if word in names), None) for word in words]
    if TRAIN in roles and len(set(roles)) > 1 and None not in roles:
        raise UsageError(
            f"{root} holds {', '.join(folders)}, which look like splits, not like classes; name the folders themselves, as in"
            f" --data {root}/{folders[roles.index(TRAIN)]}, or call them train/ and val/"
        )


def has_both(root: Path) -> bool:
    """Whether a folder is divided, so that it may have training and evaluation images."""
    return is_folder(root) and TRAIN in find_splits(root)
