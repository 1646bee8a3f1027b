"""A listing in parallel finds what one stream finds, in the same order, and asks for little more."""

import random

import pyarrow.fs as pafs
import pytest
from heliostat.storage import s3_client
from heliostat.storage.s3_client import PAGE, THREADS, files_below


class Store:
    """An object store that counts its pages: of each listing, a thousand names."""

    def __init__(self, keys: set[str]) -> None:
        self.keys, self.pages, self.longest = sorted(keys), 0, 0

    def listed(self, path: str, recursive: bool) -> list[pafs.FileInfo]:
        below = [key for key in self.keys if key.startswith(f"{path}/")]
        if not recursive:
            names = {key[len(path) + 1 :].partition("/") for key in below}
            folders = {f"{path}/{name}" for name, mark, _ in names if mark}
            below = [f"{path}/{name}" for name, mark, _ in names if not mark]
            infos = [pafs.FileInfo(folder, pafs.FileType.Directory) for folder in folders]
        else:
            infos = []
        pages = max(1, -(-(len(below) + len(infos)) // PAGE))
        self.pages, self.longest = self.pages + pages, max(self.longest, pages)
        return infos + [pafs.FileInfo(key, pafs.FileType.File) for key in below]


def listed(keys: set[str]) -> tuple[list[str], Store]:
    store = Store(keys)
    return [i.path for i in files_below("b", store.listed)], store


@pytest.mark.parametrize("seed", range(8))
def test_the_same_as_one_stream(seed, monkeypatch):
    """Whatever the shape, and whichever way is taken; with small pages, so that all are."""
    monkeypatch.setattr(s3_client, "PAGE", 5)
    rng = random.Random(seed)
    names = [str(n) for n in range(rng.choice([1, 3, 30, 200]))]
    keys = {"/".join(["b", *(rng.choice(names) for _ in range(rng.randrange(1, 7))), f"f{i}"]) for i in range(400)}
    assert listed(keys)[0] == sorted(keys)


def test_names_that_are_empty_are_found_too():
    keys = {"b//x", "b/a//y", "b/a/z"}
    assert listed(keys)[0] == sorted(keys)
    assert listed(set())[0] == []


def test_large_folders_are_listed_beside_one_another_and_small_ones_in_one_stream():
    large = {f"b/{folder:03d}/{i}" for folder in range(100) for i in range(400)}
    found, store = listed(large)
    assert found == sorted(large) and store.longest == 1 and store.pages == 1 + 100, "one page a folder"
    small = {f"b/{folder:04d}/x" for folder in range(3000)}
    found, store = listed(small)
    assert found == sorted(small) and store.pages == 3 + THREADS + 3, "a request a folder would be a thousand times as many"
    deep = {f"b/year={y}/month={m}/{i}" for y in range(4) for m in range(12) for i in range(900)}
    found, store = listed(deep)
    assert found == sorted(deep) and store.longest == 1 and store.pages <= 1 + 4 + 48 + 48
