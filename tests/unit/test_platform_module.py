"""`platform/` is a source root and must never shadow the standard library's module of that name."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
USE_BOTH = (
    "import platform, sys, heliostat.errors\n"
    "assert platform.python_version() == sys.version.split()[0].rstrip('+')\n"
    "print(platform.__file__, heliostat.errors.__file__, sep='\\n')\n"
)


def python(code: str, *flags: str, cwd: Path = ROOT, pythonpath: Path | None = None) -> list[str]:
    """The lines that a fresh Python prints."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if pythonpath:
        env["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def is_standard(file: str) -> bool:
    return Path(file).is_file() and ROOT not in Path(file).parents and Path(file).name == "platform.py"


def test_the_source_root_is_no_package():
    """An __init__.py in platform/ would make it a package that wins over the standard library's module."""
    assert (ROOT / "platform" / "heliostat" / "__init__.py").is_file()
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert [p.name for p in (ROOT / "platform").glob("*.py")] == []


def test_python_finds_its_own_platform_from_the_repository():
    """`python -c` puts the current folder first on sys.path; the standard library's module is imported all the same."""
    first, file, version = python(
        "import platform, sys; print(repr(sys.path[0]), platform.__file__, platform.python_version(), sep='\\n')"
    )
    assert first in ("''", repr(str(ROOT)))
    assert is_standard(file) and version


def test_the_installed_package_and_the_standard_module_live_together():
    """With the repository first on PYTHONPATH, both imports give what they should."""
    standard, ours = python(USE_BOTH, pythonpath=ROOT)
    assert is_standard(standard)
    assert Path(ours).name == "errors.py" and Path(ours).parent.name == "heliostat"


def test_a_wheel_holds_only_heliostat_and_leaves_platform_alone(tmp_path):
    """Built and unpacked to PYTHONPATH, with no installed copy in sight: no `platform` in it, and both imports work."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            (source / name).write_bytes((ROOT / name).read_bytes())
    (source / "README.md").touch()
    for path in (ROOT / "platform").rglob("*"):
        relative = path.relative_to(ROOT)
        if path.is_file() and path.suffix != ".pyc" and not any(p.endswith(".egg-info") for p in relative.parts):
            (source / relative).parent.mkdir(parents=True, exist_ok=True)
            (source / relative).write_bytes(path.read_bytes())
    command = [
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    ]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("heliostat-*.whl")
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        z.extractall(tmp_path / "unpacked")
    assert {n.split("/")[0] for n in names} == {"heliostat", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    sources = {str(p.relative_to(ROOT / "platform")) for p in (ROOT / "platform" / "heliostat").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == sources
    # -S: without site-packages, so that neither the editable install nor its import hook can help
    standard, ours = python(USE_BOTH, "-S", cwd=tmp_path, pythonpath=tmp_path / "unpacked")
    assert is_standard(standard)
    assert Path(ours) == tmp_path / "unpacked" / "heliostat" / "errors.py"
