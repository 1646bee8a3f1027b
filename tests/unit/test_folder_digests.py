"""Tests digests of model folders: the processes of a machine read a large file once, and never keep the digest of changed
weights."""

import hashlib
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import pytest
from heliostat.recipes import folder_digests
from heliostat.storage import local_files

CONTENT = b"weights" * 1000


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """Returns a file of weights that counts as large, and has been in its folder for a while; the cache is empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(folder_digests, "LARGE", 1)
    monkeypatch.setattr(folder_digests, "SETTLED_NS", 50_000_000)
    file = tmp_path / "model" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    time.sleep(0.1)
    return file


def elsewhere(file: Path) -> tuple[str, int]:
    """Computes a file's digest in another process of this machine. Returns it with how often that process read the file."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_counted, (file,))


def _counted(file: Path) -> tuple[str, int]:
    reads, content = [], folder_digests._content
    folder_digests._content = lambda path: reads.append(path) or content(path)
    folder_digests._sha256.cache_clear()
    return folder_digests.sha256(file), len(reads)


def test_one_process_of_a_machine_reads_a_file(weights):
    right = hashlib.sha256(CONTENT).hexdigest()
    assert [elsewhere(weights) for _ in range(3)] == [(right, 1), (right, 0), (right, 0)]
    assert local_files.is_ours(local_files.cache("digests")), "no other user can write a digest"
    with multiprocessing.get_context("fork").Pool(3) as pool:
        link = weights.with_name("link")
        os.link(weights, link)  # changes the inode's time, so the digest is of no known file
        time.sleep(0.1)
        answers = pool.map(_counted, [link] * 3, chunksize=1)
    assert {digest for digest, _ in answers} == {right} and sum(reads for _, reads in answers) == 1


def test_a_digest_is_never_that_of_former_content(weights):
    """Neither the size nor the time of change of the content shows this change: only the inode's time does."""
    first, before = elsewhere(weights)[0], weights.stat()
    with weights.open("r+b") as file:
        file.write(b"W")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = weights.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert elsewhere(weights) == (hashlib.sha256(b"W" + CONTENT[1:]).hexdigest(), 1) != (first, 1)


def test_the_digest_of_a_file_that_just_changed_is_not_shared(weights, monkeypatch):
    """A second change in the same tick of the file system's clock would have the same times."""
    monkeypatch.setattr(folder_digests, "SETTLED_NS", 60_000_000_000)
    assert [reads for _, reads in (elsewhere(weights), elsewhere(weights))] == [1, 1]


def test_without_a_cache_each_process_reads_the_file(weights, caplog):
    cache = local_files.cache("digests")
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    folder_digests._sha256.cache_clear()
    assert folder_digests.sha256(weights) == hashlib.sha256(CONTENT).hexdigest()
    assert "can't share the digest of model.safetensors" in caplog.text
    assert not [*cache.iterdir()]


def test_a_digest_depends_on_the_weights_that_transformers_loads(weights):
    """Pickles if the folder has no safetensors, and otherwise only these."""
    folder = weights.parent
    (folder / "config.json").write_text("{}")
    pickle, digests = folder / "pytorch_model-00001-of-00001.bin", [folder_digests.weights_digest(folder)]
    pickle.write_bytes(b"other weights")
    assert folder_digests.weights_digest(folder) == digests[0]
    weights.unlink()
    for content in (b"first", b"second"):
        pickle.write_bytes(content)
        digests.append(folder_digests.weights_digest(folder))
        assert [name for name, *_ in folder_digests.weights_state(folder)] == ["config.json", pickle.name]
    assert len(set(digests)) == 3
    pickle_digest, config = digests[2], folder_digests.sha256(folder / "config.json")
    assert folder_digests.matches(folder, pickle_digest, folder_digests.digest_of({"config.json": config})), "earlier versions"
    assert not folder_digests.matches(folder, pickle_digest, digests[1])
