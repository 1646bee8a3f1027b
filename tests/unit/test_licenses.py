"""Tests that licenses are recognized by every word of their texts, and that documents are kept by them. An unknown text never
counts as a known license."""

import time

import pytest
from heliostat.curation import licenses
from heliostat.curation.licenses import Licenses, is_license_file, spdx_of
from heliostat.curation.stage import Document
from heliostat.curation.stages.license import License, allows
from identify.vendor.licenses import LICENSES

TEXTS = dict(LICENSES)


@pytest.mark.parametrize("id", TEXTS)
def test_a_text_is_told_however_it_is_laid_out_and_no_longer_if_it_is_changed(id):
    text = TEXTS[id]
    assert spdx_of(text) == id
    assert spdx_of(text.upper().replace("\n", "\r\n")) == id, "case and line ends"
    assert spdx_of("Copyright (c) 2024 A. N. Other\nAll rights reserved.\n\n" + text) == id
    words = text.split()
    place = next(i for i in range(len(words) // 2, len(words)) if words[i].isalpha())
    assert spdx_of(" ".join([*words[:place], "not", *words[place:]])) is None
    assert spdx_of(text + "\nYou may not sell it, nor use it on Sundays.\n") is None
    assert spdx_of("You may not sell it. Otherwise:\n\n" + text) is None
    assert spdx_of(text + "\n" + TEXTS["MIT" if id != "MIT" else "ISC"]) is None


def test_what_spdx_lets_vary():
    """Names of holders, list marks, a title or none, and the terms without the advice after them."""
    bsd = TEXTS["BSD-3-Clause"]
    ours = (
        bsd.replace("the copyright holder nor", "Example Ltd. nor").replace("1. Redis", "* Redis").replace("2. Redis", " - Redis")
    )
    ours = ours.replace("THE COPYRIGHT HOLDERS AND CONTRIBUTORS", "EXAMPLE LTD.").replace("BSD 3-Clause License", "")
    assert ours != bsd and spdx_of(ours) == "BSD-3-Clause"
    apache, gpl = TEXTS["Apache-2.0"], TEXTS["GPL-3.0"]
    assert spdx_of(apache[: apache.index("APPENDIX")]) == spdx_of(apache[: apache.index("END OF")]) == "Apache-2.0"
    assert (
        spdx_of(gpl[: gpl.index("How to Apply")])
        == spdx_of(gpl.replace("https://www.gnu.org", "http://www.gnu.org"))
        == "GPL-3.0"
    )
    assert spdx_of("The MIT License (MIT)\n\n" + TEXTS["MIT"].partition("\n")[2]) == "MIT"
    assert spdx_of("") is spdx_of("MIT") is None


@pytest.mark.parametrize("text", ["\n", " ", "(c)\n", "a ", "provided by ", "in no event shall ", "copyright ", "1. ", "<",
                                  "write to the free software foundation inc 1 ", "neither the name of "])  # fmt: skip
def test_hostile_text_takes_linear_time(text):
    start = time.process_time()
    assert spdx_of((text * licenses.MOST)[: licenses.MOST]) is None
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LICENSE", True), ("a/LICENCE.md", True), ("COPYING.LESSER", True), ("LICENSE-MIT.txt", True), ("UNLICENSE", True),
        ("license.rst", True), ("MIT-LICENSE", True), ("license.py", False), ("src/license_check.js", False), ("licensed", False),
        ("NOTICE", False), ("copying.c", False), ("sublicense", False), ("LICENSE/a.txt", False),
    ],
)  # fmt: skip
def test_names_of_licence_files(name, expected):
    assert is_license_file(name) is expected


def test_the_nearest_folder_decides_and_several_files_are_joined():
    found = Licenses()
    found.add("LICENSE-MIT", TEXTS["MIT"])
    found.add("LICENSE-APACHE", TEXTS["Apache-2.0"])
    found.add("sub/COPYING", "mine alone")
    found.add("sub/x/LICENSE", TEXTS["ISC"])
    assert found.of("a/b/c.py", "") == "Apache-2.0 AND MIT"
    assert found.of("sub/a.py", "") == "NOASSERTION" and found.of("sub/x/y/a.py", "") == "ISC"
    assert found.of("sub/a.py", "/* SPDX-License-Identifier: MIT OR Apache-2.0 */\n") == "MIT OR Apache-2.0"
    assert Licenses().of("a.py", "# SPDX-License-Identifier: \n") == "NONE"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("MIT", True), ("mit", True), ("GPL-3.0", False), ("GPL-3.0 OR MIT", True), ("GPL-3.0 AND MIT", False),
        ("Apache-2.0 WITH LLVM-exception", True), ("(GPL-3.0 OR MIT) AND ISC", True), ("GPL-3.0 OR MIT AND GPL-2.0", False),
        ("((((MIT))))", True), ("(" * 50 + "MIT" + ")" * 50, True),
        ("MIT OR", None),
        ("OR MIT", None), ("(MIT", None), ("MIT)", None), ("MIT GPL-3.0", None), ("MIT; GPL", None), ("", None),
        ("A" * 2000, None), ("(" * 51 + "MIT" + ")" * 51, None),
    ],
)  # fmt: skip
def test_expressions(said, expected):
    assert allows(said, {"mit", "isc", "apache-2.0"}) is expected


def test_the_stage_counts_what_it_does_not_know():
    def outcome(license, **keys):
        (made,) = License(**keys).open()([Document("a", "x", {} if license is None else {"license": license})])
        return made.reason or (made.counts or "kept")

    assert outcome("MIT") == outcome(["MIT", "Apache-2.0"]) == "kept"
    assert outcome("GPL-3.0") == outcome(["MIT", "GPL-3.0"]) == "not_allowed" and outcome("GPL-3.0", allow=["GPL-3.0"]) == "kept"
    assert outcome("NOASSERTION") == outcome(None) == outcome("") == outcome(7) == outcome("who knows?") == "unknown"
    assert outcome("NONE") == outcome([]) == "none"
    assert outcome("NONE", keep_none=True) == {"none": 1} and outcome("NOASSERTION", keep_unknown=True) == {"unknown": 1}
    assert outcome("MIT AND NOASSERTION") == "unknown"
