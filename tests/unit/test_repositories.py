"""Tests that files of archives and git clones become documents with license and language. Hostile content is reported, and has no
effect."""

import gzip
import io
import os
import random
import stat
import struct
import subprocess
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from heliostat.curation.readers import REASONS, Limits, archives, clones, repository
from heliostat.curation.stage import Document, Dropped
from heliostat.curation.text import repositories
from heliostat.errors import ConfigError

from tests.seeds import every_seed
from tests.unit.bounded import python_peak

LIMITS = Limits(max_document_bytes=1 << 16)
MIT = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation "
    'files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy, '
    "modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the "
    "Software is furnished to do so, subject to the following conditions:\n\nThe above copyright notice and this permission "
    "notice shall be included in all copies or substantial portions of the Software.\n\nTHE SOFTWARE IS PROVIDED \"AS IS\", "
    "WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS "
    "FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, "
    "DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH "
    "THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.\n"
)  # fmt: skip
FILES = {
    "top/src/b.py": b"print('b')\n",
    "top/tool": b"#!/usr/bin/env python3\nprint('tool')\n",
    "top/vendor/x/lib.c": b"int x;\n",
    "top/vendor/x/COPYING": b"Do what you like on Tuesdays.\n",
    "top/zz/own.c": b"// SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note\nint y;\n",
    "top/LICENSE": MIT.encode(),  # behind what it holds for
    "top/logo.png": b"\x89PNG\0\1",
    "top/latin.txt": b"\xe9t\xe9",
    "top/none.py": b" \n",
    "top/large.json": b"1" * (1 << 17),
    "other/a.go": b"package a\n",
}
EXPECTED = {
    "top/src/b.py": ("MIT", "Python"),
    "top/tool": ("MIT", "Python"),
    "top/vendor/x/lib.c": ("NOASSERTION", "C"),
    "top/vendor/x/COPYING": ("NOASSERTION", None),
    "top/zz/own.c": ("GPL-2.0-only WITH Linux-syscall-note", "C"),
    "top/LICENSE": ("MIT", None),
    "other/a.go": ("NONE", "Go"),
}
LEFT_OUT = {"top/logo.png": "binary", "top/latin.txt": "not_utf8", "top/none.py": "empty", "top/large.json": "too_large"}


def tar(files=FILES, mode="w", extra=()):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return out.getvalue()


def zipped(files=FILES, packing=zipfile.ZIP_DEFLATED, links=()):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packing) as archive:
        archive.writestr("top/", b"")
        for name, data in files.items():
            archive.writestr(name, data)
        for name in links:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
    return out.getvalue()


def items(path, data, limits=LIMITS):
    found = list(archives.read(path, io.BytesIO(data), limits))
    assert all(d.reason in REASONS for d in found if isinstance(d, Dropped))
    assert len({d.id for d in found}) == len(found) and all(d.id.startswith(path) for d in found)
    return found


def reasons(found):
    return Counter(d.reason for d in found if isinstance(d, Dropped))


def kept(found):
    return {d.columns["path"]: d for d in found if isinstance(d, Document)}


PACKED = {
    "own/repo.tar": tar(),
    "own/repo.tar.gz": gzip.compress(tar()),
    "own/repo.TGZ": gzip.compress(tar()),
    "own/repo.tar.zst": pa.compress(tar(), "zstd", asbytes=True),
    "own/repo.tar.xz": tar(mode="w:xz"),
    "own/repo.zip": zipped(),
}


@pytest.mark.parametrize("path", PACKED)
def test_each_file_is_a_document_with_licence_and_language(path):
    """For any compression. License files apply to the files below them, at any place in the archive."""
    found = items(path, PACKED[path])
    assert {d.id: d.reason for d in found if isinstance(d, Dropped)} == {f"{path}#{n}": r for n, r in LEFT_OUT.items()}
    assert {name: (d.columns["license"], d.columns.get("language")) for name, d in kept(found).items()} == EXPECTED
    assert all(d.id == f"{path}#{name}" and d.text.encode() == FILES[name] for name, d in kept(found).items())
    assert {d.columns["repository"] for d in kept(found).values()} == {"own/repo"}


def test_licence_files_beyond_the_limit_are_not_known_and_not_overlooked(monkeypatch):
    """Otherwise their folders would have the license of the folder above."""
    monkeypatch.setattr(repository, "LICENSE_FILES", 1)
    files = {"LICENSE": MIT.encode(), "a/LICENSE": b"Other terms.", "a/x.py": b"x = 1\n", "b/y.py": b"y = 1\n"}
    found = {d.columns["path"]: d.columns["license"] for d in archives.read("x.tar", io.BytesIO(tar(files)), LIMITS)}
    assert found == {"LICENSE": "MIT", "a/LICENSE": "NOASSERTION", "a/x.py": "NOASSERTION", "b/y.py": "MIT"}


def test_names_that_lead_out_links_and_devices_are_left_out_and_counted():
    made = {"../../etc/cron.d/x": b"x", "/etc/passwd": b"x", "a/../../b": b"x", "..\\up": b"x", "ok.py": b"x = 1\n"}
    extra = []
    for name, kind in (("l", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE), ("d", tarfile.CHRTYPE), ("p", tarfile.FIFOTYPE)):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        extra.append(info)
    found = items("a.tar", tar(made, extra=extra))
    assert reasons(found) == {"outside": 4, "link": 2, "special": 2} and list(kept(found)) == ["ok.py"]
    found = items("a.zip", zipped(made, links=["l"]))
    assert reasons(found) == {"outside": 4, "link": 1} and list(kept(found)) == ["ok.py"]


def test_a_second_file_of_a_name_and_names_of_any_bytes():
    twice = tar({"a.py": b"first = 1\n"})[:1024] + tar({"a.py": b"second = 2\n", "n\nl.py": b"x\n"})
    found = items("a.tar", twice)
    assert reasons(found) == {"repeated": 1} and kept(found)["a.py"].text == "first = 1\n" and "n\nl.py" in kept(found)
    raw = tar({"xx.py": b"x = 1\n"}).replace(b"xx.py", b"x\xff.py")
    fixed = bytearray(raw)
    fixed[148:156] = b" " * 8
    fixed[148:156] = b"%06o\0 " % sum(fixed[:512])
    assert list(kept(items("a.tar", bytes(fixed)))) == ["x\\xff.py"]


@pytest.mark.parametrize("path", ["bomb.tar.gz", "bomb.zip", "bomb.tar.zst"])
def test_a_bomb_is_named_and_little_of_it_held(path):
    """The files before it are kept."""
    big = {"a.py": b"x = 1\n", **{f"{n}.txt": b"\n" * (60 << 20) for n in range(2)}}
    data = zipped(big) if path.endswith("zip") else gzip.compress(tar(big), 9) if path.endswith("gz") else pa.compress(
        tar(big), "zstd", asbytes=True)  # fmt: skip
    assert len(data) < 1 << 20
    found = list[Document | Dropped]()
    assert python_peak(lambda: found.extend(items(path, data, Limits(max_document_bytes=61 << 20)))) < 200 << 20
    assert list(kept(found)) == ["a.py"] and reasons(found)["bomb"] == 1
    assert reasons(items(path, data))["too_large"] >= 1, "files that are larger than a document may be are not unpacked for it"


def test_a_member_that_unpacks_to_more_than_it_says_takes_little_memory():
    """For any compression: bzip2 compresses 64 MiB to 80 bytes, in blocks that zipfile decompresses at once."""
    for packing in (zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED):
        data = bytearray(zipped({"a.py": b"\n" * (64 << 20)}, packing))
        place = data.rindex(b"PK\1\2")
        data[place + 24 : place + 28] = struct.pack("<I", 10)
        found, packed = list[Document | Dropped](), bytes(data)
        assert python_peak(lambda found=found, packed=packed: found.extend(items("a.zip", packed))) < 12 << 20
        assert reasons(found) == {"corrupt": 1}


def test_members_packed_by_bzip2():
    rng = random.Random(0)
    made = {"a.txt": rng.randbytes(3 << 20).hex().encode(), "b.py": b"x = 1\n" * 100_000, "c.py": b"y = 1\n"}
    data = zipped(made, zipfile.ZIP_BZIP2)
    assert {n: d.text.encode() for n, d in kept(items("a.zip", data, Limits(max_document_bytes=8 << 20))).items()} == made
    broken = bytearray(data)
    broken[data.index(b"b.py") + 30] ^= 1
    assert list(kept(items("a.zip", bytes(broken), Limits(max_document_bytes=8 << 20)))) == ["a.txt", "c.py"]


def test_a_head_that_is_too_large_is_not_read():
    """tarfile reads long names and lists of holes whole, up to the size that they claim."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    found, data = list[Document | Dropped](), tar({"a.py": b"x = 1\n"})[:1024] + info.tobuf() + b"n" * (4 << 20)
    assert python_peak(lambda: found.extend(items("a.tar", data))) < 16 << 20
    assert list(kept(found)) == ["a.py"] and reasons(found) == {"corrupt": 1}


def test_every_cut_is_told():
    whole, packed, file = tar(), gzip.compress(tar()), zipped()
    for end in range(1, len(whole) - 2 * tarfile.RECORDSIZE, 997):
        assert set(reasons(items("a.tar", whole[:end]))) & {"corrupt", "truncated"}, end
    for end in range(1, len(packed), 41):
        assert set(reasons(items("a.tar.gz", packed[:end]))) & {"corrupt", "truncated"}, end
    for end in range(1, len(file), 41):
        assert set(reasons(items("a.zip", file[:end]))) & {"corrupt"}, end
    for path in ("a.tar", "a.tar.gz", "a.zip"):
        assert sum(reasons(items(path, b"")).values()) == sum(reasons(items(path, b"no archive" * 200)).values()) == 1


@every_seed(40)
def test_noise_in_an_archive_raises_nothing(seed):
    import random

    rng = random.Random(seed)
    for path, data in (("a.tar", tar()), ("a.zip", zipped()), ("a.tar.gz", gzip.compress(tar()))):
        noisy = bytearray(data)
        for _ in range(1 + seed % 6):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        items(path, bytes(noisy))


def test_packings_that_are_not_read_are_named():
    assert reasons(items("a.zip", zipped({"a.py": b"x = 1\n"}, zipfile.ZIP_LZMA))) == {"packing": 1}
    encrypted = bytearray(zipped({"a.py": b"x = 1\n"}))
    place = encrypted.rindex(b"PK\1\2")
    encrypted[place + 8] |= 1
    assert reasons(items("a.zip", bytes(encrypted)))["packing"] == 1


def test_errors_of_the_stream_pass_through():
    class Failing(io.BytesIO):
        def read(self, *_):
            raise OSError(5, "Input/output error")

    for path in ("a.tar", "a.zip", "a.tar.gz", "a.tar.zst"):
        with pytest.raises(OSError, match="Input/output"):
            list(archives.read(path, Failing(PACKED["own/repo.zip"]), LIMITS))


# git -------------------------------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "protocol.file.allow=always"]
    subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, env=os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """Creates a clone with a working tree: the files, a link, a submodule, and a file that was never committed."""
    top = tmp_path_factory.mktemp("clones") / "in"
    folder = top / "own/repo"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "link").symlink_to("/etc/passwd")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},sub")
    git(folder, "commit", "-q", "-m", "one")
    (folder / "later.py").write_text("never committed\n")
    return top


def test_a_clone_gives_what_was_committed(clone):
    found = list(clones.read("own/repo/.git", clone / "own/repo/.git", LIMITS))
    assert {name: (d.columns["license"], d.columns.get("language")) for name, d in kept(found).items()} == EXPECTED
    assert reasons(found) == Counter(LEFT_OUT.values()) + Counter(link=2)
    assert {d.columns["repository"] for d in kept(found).values()} == {"own/repo"}
    commit, size = clones.facts(clone / "own/repo/.git")
    assert {d.columns["commit"] for d in kept(found).values()} == {commit}
    assert size == sum(map(len, FILES.values())) + len("/etc/passwd")


def test_a_listing_of_clones_and_archives_says_the_same_however_git_keeps_them(clone, tmp_path):
    (tmp_path / "own").mkdir()
    git(tmp_path, "clone", "-q", "--bare", str(clone / "own/repo"), "own/repo.git")
    git(tmp_path / "own/repo.git", "gc", "-q")
    (tmp_path / "b.tar.gz").write_bytes(b"x")
    (tmp_path / "note.md").write_text("x")
    (bare, archive) = sorted(repositories.listing(str(tmp_path)), key=lambda f: f.path, reverse=True)
    (working,) = repositories.listing(str(clone))
    assert (bare.path, archive.path, working.path) == ("own/repo.git", "b.tar.gz", "own/repo/.git")
    assert (bare.bytes, bare.modified) == (working.bytes, working.modified)
    assert repositories.listing(str(tmp_path / "own/repo.git"))[0].path == ""
    one = list(clones.read("own/repo.git", tmp_path / "own/repo.git", LIMITS, repositories.commit_of(bare.modified)))
    two = list(clones.read("own/repo/.git", clone / "own/repo/.git", LIMITS))
    assert [d.text for d in kept(one).values()] == [d.text for d in kept(two).values()]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"0 files, but no archive .* and no git clone"):
        repositories.listing(str(tmp_path / "empty"))


def test_a_hostile_clone_runs_nothing_and_leads_nowhere(clone, tmp_path):
    """Hooks, monitors, remotes, and objects from elsewhere; a missing commit, and a damaged object."""
    git(tmp_path, "clone", "-q", "--bare", str(clone / "own/repo"), "x.git")
    folder, trap = tmp_path / "x.git", tmp_path / "trap"
    with (folder / "config").open("a") as config:
        config.write(f'[core]\n\tfsmonitor = "touch {trap}"\n\tsshCommand = "touch {trap}"\n\tpager = "touch {trap}"\n'
                     f'[remote "origin"]\n\tpromisor = true\n\turl = "ext::touch {trap}"\n'
                     f'[extensions]\n\tpartialClone = origin\n[alias]\n\tls-tree = "!touch {trap}"\n')  # fmt: skip
    whole = kept(clones.read("x.git", folder, LIMITS))
    blob = subprocess.run(
        ["git", "--git-dir", str(folder), "rev-parse", "HEAD:top/src/b.py"], capture_output=True, text=True, check=True
    )
    for pack in folder.glob("objects/pack/*.pack"):
        moved = tmp_path / pack.name
        pack.rename(moved)
        moved.chmod(0o644)
        with moved.open("rb") as data:
            subprocess.run(["git", "--git-dir", str(folder), "unpack-objects", "-q"], stdin=data, check=True)
    (folder / "objects" / blob.stdout[:2] / blob.stdout[2:].strip()).unlink()
    found = list(clones.read("x.git", folder, LIMITS))
    assert {d.id for d in found if isinstance(d, Dropped) and d.reason == "unreadable"} == {"x.git#top/src/b.py"}
    assert kept(found).keys() == whole.keys() - {"top/src/b.py"} and not trap.exists()
    assert reasons(clones.read("x.git", folder, LIMITS, "1" * 15)) == {"corrupt": 1}
    (folder / "objects/info/alternates").write_text("/somewhere/objects\n")
    assert reasons(clones.read("x.git", folder, LIMITS)) == {"outside": 1}
    (tmp_path / "link.git").symlink_to(clone / "own/repo/.git")
    assert reasons(clones.read("link.git", tmp_path / "link.git", LIMITS)) == {"outside": 1}
    (tmp_path / "no.git").mkdir()
    assert reasons(clones.read("no.git", tmp_path / "no.git", LIMITS)) == {"corrupt": 1}
