"""Pickles that leave a mark when they are loaded: what a hostile model or data set may hold."""

import pickle

from badinput.harness import CODE_RAN


class _Runs:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self):
        return (exec, (self.code,))


def pickle_of(place) -> bytes:
    """A pickle whose loading writes ``code-ran``."""
    assert CODE_RAN in place.payload()
    return pickle.dumps(_Runs(place.payload()))
