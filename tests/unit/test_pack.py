"""Tests what a submitted job takes along: code, by the rules of .gitignore, and never data, secrets, or the repository itself."""

import subprocess
from pathlib import Path

import pytest
from heliostat.cluster import workspace_package
from heliostat.errors import ConfigError

from tests.unit.build_job import ROOT


def make(folder: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def names(folder: Path) -> list[str]:
    return [str(p) for p in workspace_package.look(folder).files]


def test_code_travels_and_git_data_and_secrets_never_do(tmp_path):
    """This holds even if no .gitignore names them."""
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


SECRETS = [
    ".envrc", ".env", "prod.env", "gcp-key.json", ".git-credentials", ".pgpass", ".npmrc", ".pypirc", ".docker/config.json",
    "application_default_credentials.json", "prod.tfvars", "terraform.tfstate", "infra/terraform.tfstate.backup", "id_rsa",
    "secrets/db.txt", "id_work", "deploy.pem", "deploy.PEM", "Server.Key", "ID_ED25519", ".SSH/config", "home/.aws/config",
    "Secrets.YAML", "client_secret.json", "my-service_account.json", "kubeconfig-prod", ".netrc", "hf_token",
    ".kaggle/kaggle.json", "jobs/.Envrc", ".config/gcloud/x.db",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_a_file_that_may_hold_secrets_by_its_name_does_not_travel_in_any_case_of_letters_and_is_listed(tmp_path, name):
    make(tmp_path, "jobs/a.py", "jobs/id_map.py", name)
    packed = workspace_package.look(tmp_path)
    assert [str(p) for p in packed.files] == ["jobs/a.py", "jobs/id_map.py"]
    ((reason, paths),) = packed.left_out.items()
    assert reason == workspace_package.SECRET and len(paths) == 1 and name.startswith(paths[0])


def test_a_link_to_a_secret_under_another_name_does_not_travel_and_is_listed(tmp_path):
    """Files that aren't sent themselves aren't sent through a link: secrets, ignored files, folders, and files outside."""
    make(tmp_path, "a.py", ".env", "kept/KEY.PEM", "private.txt", "folder/b.py")
    (tmp_path / ".gitignore").write_text("private.txt\n")
    for name, target in {"notes.txt": ".env", "cert.txt": "kept/KEY.PEM", "more.txt": "private.txt", "chain.txt": "notes.txt",
                         "sub": "folder", "ours.py": "folder/b.py", "gone.txt": "nothing"}.items():  # fmt: skip
        (tmp_path / name).symlink_to(target)
    packed = workspace_package.look(tmp_path)
    assert [str(p) for p in packed.files] == ["a.py", "folder/b.py", "ours.py"]
    assert packed.left_out[workspace_package.LINK] == ["cert.txt", "chain.txt", "gone.txt", "more.txt", "notes.txt", "sub"]
    assert packed.left_out[workspace_package.SECRET] == [".env", "kept/KEY.PEM"]


def test_a_yaml_file_with_a_password_does_not_travel_and_what_is_left_out_is_said(tmp_path, caplog):
    make(tmp_path / "work", "jobs/a.py", "data.parquet")
    make(tmp_path / "work", "jobs/a.yaml", text="mlflow: {uri: 'http://h:5000'}\npassword: ${PASSWORD}\n")
    make(tmp_path / "work", "jobs/b.yaml", text="mlflow:\n  uri: mysql://u:hunter2@h/db\n")
    make(tmp_path / "work", "jobs/c.YML", text="db:\n  password: hunter2\n")
    make(tmp_path / "work", *(f"{i}.pem" for i in range(20)))
    workspace_package.stage(tmp_path / "work", tmp_path / "there")
    assert sorted(p.name for p in (tmp_path / "there").rglob("*.*")) == ["a.py", "a.yaml"]
    said = caplog.text
    assert "2 paths that contain a password: jobs/b.yaml, jobs/c.YML" in said and "1 paths that are data: data.parquet" in said
    assert "20 paths that may contain secrets: 0.pem, 1.pem" in said and "and 12 more" in said and "hunter2" not in said


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
        workspace_package.look(tmp_path, limit=4000)
    lines = str(e.value).splitlines()
    assert ".gitignore" in lines[0] and lines[1].endswith("videos/big.bin") and lines[2].endswith("middle.bin")
    assert len(workspace_package.look(tmp_path, limit=6000).files) == 3


def test_a_link_out_of_the_workspace_does_not_travel(tmp_path):
    make(tmp_path, "outside/secret.txt", "work/a.py")
    (tmp_path / "work" / "link.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    (tmp_path / "work" / "inside.py").symlink_to(tmp_path / "work" / "a.py")
    (tmp_path / "work" / "folder").symlink_to(tmp_path / "outside")
    assert names(tmp_path / "work") == ["a.py", "inside.py"]


def test_this_workspace_is_small_enough_and_has_the_recipes(tmp_path):
    workspace_package.stage(ROOT, tmp_path)
    assert {workspace_package.LINK, workspace_package.KEPT} & workspace_package.look(
        ROOT
    ).left_out.keys() == workspace_package.look(ROOT).left_out.keys()  # nothing of ours is secret
    assert (tmp_path / "jobs" / "quickstart.yaml").is_file() and not (tmp_path / ".git").exists()
    package = workspace_package.stage_package(tmp_path / "modules")
    assert (
        (package / "submit" / "entrypoint.py").is_file()
        and (package / "recipes" / "text" / "causal_lm.py").is_file()
        and (package / "plan" / "prices.yaml").is_file()
    )
    assert not list(package.rglob("*.pyc"))
