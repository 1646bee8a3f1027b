"""What travels with a job: code, as .gitignore says, and never data, secrets or the repository itself."""

import subprocess
from pathlib import Path

import pytest
from heliostat.cluster import pack
from heliostat.errors import ConfigError

from tests.unit.build_job import ROOT


def make(folder: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def names(folder: Path) -> list[str]:
    return [str(p) for p in pack.files(folder)]


def test_code_travels_and_git_data_and_secrets_never_do(tmp_path):
    """Even where no .gitignore names them."""
    make(tmp_path, "jobs/a.py", "jobs/a.yaml", "README.md", "src/deep/er/b.py")
    make(tmp_path, ".git/config", ".heliostat/data/x", ".venv/lib/y.py", "jobs/__pycache__/a.pyc", "mlruns/0/meta.yaml")
    make(tmp_path, "data/part.parquet", "model.safetensors", "old.ckpt", "mlflow.db")
    make(
        tmp_path,
        ".env",
        ".env.production",
        "key.pem",
        "home/.ssh/id_rsa",
        ".aws/credentials",
        "gcp-service-account-1.json",
        "auth_token",
    )
    assert names(tmp_path) == ["README.md", "jobs/a.py", "jobs/a.yaml", "src/deep/er/b.py"]


def test_gitignore_files_are_respected_as_git_does(tmp_path):
    """In every folder, with negations: the same files that git would add."""
    make(
        tmp_path,
        "a.py",
        "a.log",
        "keep.log",
        "out/x.py",
        "sub/b.py",
        "sub/c.tmp",
        "sub/out/y.py",
        "sub/deep/d.tmp",
        "sub/deep/e.py",
    )
    make(tmp_path, "other/out.py", "sub/only.txt", "only.txt")
    (tmp_path / ".gitignore").write_text("*.log\n!keep.log\n/out/\n# no comment.py\n")
    (tmp_path / "sub" / ".gitignore").write_text("*.tmp\n/only.txt\n")
    (tmp_path / "sub" / "deep" / ".gitignore").write_text("!d.tmp\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert names(tmp_path) == sorted(n for n in listed if not n.endswith(".gitignore"))
    assert "keep.log" in listed and "sub/deep/d.tmp" in listed and "a.log" not in listed


def test_too_much_is_refused_with_the_biggest_paths_first(tmp_path):
    make(tmp_path, "small.py")
    make(tmp_path, "videos/big.bin", text="x" * 3000)
    make(tmp_path, "middle.bin", text="x" * 2000)
    with pytest.raises(ConfigError) as e:
        pack.files(tmp_path, limit=4000)
    lines = str(e.value).splitlines()
    assert ".gitignore" in lines[0] and lines[1].endswith("videos/big.bin") and lines[2].endswith("middle.bin")
    assert len(pack.files(tmp_path, limit=6000)) == 3


def test_a_link_out_of_the_workspace_does_not_travel(tmp_path):
    make(tmp_path, "outside/secret.txt", "work/a.py")
    (tmp_path / "work" / "link.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    (tmp_path / "work" / "inside.py").symlink_to(tmp_path / "work" / "a.py")
    (tmp_path / "work" / "folder").symlink_to(tmp_path / "outside")
    assert names(tmp_path / "work") == ["a.py", "inside.py"]


def test_this_workspace_is_small_enough_and_has_the_recipes(tmp_path):
    pack.stage(ROOT, tmp_path)
    assert (tmp_path / "jobs" / "causal_lm.py").is_file() and not (tmp_path / ".git").exists()
    package = pack.stage_package(tmp_path / "modules")
    assert (package / "cluster" / "driver.py").is_file() and (package / "plan" / "prices.yaml").is_file()
    assert not list(package.rglob("*.pyc"))
