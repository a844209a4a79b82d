"""Whose the folders of a run are: what it may remove of them."""

import re

from open_lm.tokenize.folder import PARTIAL, Folder
from open_lm.tokenize.plan import PLAN, Plan, is_claimed

# Every name that a run writes. What has another one is somebody else's and stays, whatever folder it is in.
IN_WORK = re.compile(
    r"plan\.json|(unit_\d{6}_[0-9a-f]{8}|shard_(train|held_out)_\d{8}_[0-9a-f]{8})\.json"
    r"|unit_\d{6}_[0-9a-f]{8}_\d{4,}\.ids|pack_(train|held_out)_(\d{6}|tails)_[0-9a-f]{8}\.(json|rows)"
)
IN_OUTPUT = re.compile(
    r"plan\.json|bad\.jsonl|(held_out/)?(manifest\.jsonl|info\.json|tokenizer\.json|shard_\d{8}\.tar)"
)
PARTIAL_END = re.compile(r"\.[0-9a-f]{8}" + re.escape(PARTIAL) + "$")


def find_made(names: set[str], made: re.Pattern[str], partial_only: bool = False) -> set[str]:
    """Those of the names that a run gives its files, whole or partial."""
    return {
        name
        for name in names
        if made.fullmatch(PARTIAL_END.sub("", name)) and (PARTIAL_END.search(name) or not partial_only)
    }


def remove_work(work: Folder, plan: Plan, remove_folder: bool) -> None:
    """Removes what a run of this plan made in its work folder, if it is one; its plan last, so that what a kill
    leaves is still known as this plan's."""
    if not is_claimed(work, plan):
        return
    made = find_made(work.names(), IN_WORK)
    work.delete(made - {PLAN})
    work.delete({PLAN})
    if remove_folder:
        work.remove_empty()


def remove_partials(output: Folder) -> None:
    """Removes what a killed run had not finished writing."""
    output.delete(find_made(output.names(), IN_OUTPUT, partial_only=True))
