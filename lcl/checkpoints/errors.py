"""What can go wrong with a checkpoint, in one line with the mend."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint could not be written or read; one line that says what to do."""


class Damaged(Exception):
    """A checkpoint that is torn or corrupted: the one before it is tried."""


def reason(error: BaseException) -> str:
    """The first telling line of an error, short."""
    text = " ".join(str(error).split()) or type(error).__name__
    for known in ("No space left on device", "File too large", "Disk quota exceeded"):
        if known in text:
            return known
    strerror = getattr(error, "strerror", None)
    return strerror if strerror else (text if len(text) <= 160 else text[:157] + "...")


def mend(error: BaseException) -> str:
    """What a user can do about a failed write."""
    text = str(error)
    if any(word in text for word in ("No space left", "quota", "File too large")):
        return "free some space or keep fewer (CheckpointPolicy.keep_last), then resume"
    if isinstance(error, PermissionError) or "Permission denied" in text:
        return "mend its permissions or give another --run_dir, then resume"
    return "see the cause above, then resume"
