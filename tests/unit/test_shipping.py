"""Tests how models and word lists reach nodes that lack them."""

import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest
import ray
from heliostat.curation.images.latents import Latents
from heliostat.errors import ConfigError, HeliostatError
from heliostat.storage import local_files
from heliostat.storage.locations import Location
from heliostat.tasks import crew, files, flow, shipping
from heliostat.tasks.clusters import TaskKind
from heliostat.tasks.shipping import NotHereError, describe, here, offer
from heliostat.tasks.work import Work


@pytest.fixture
def spill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    return Location(str(tmp_path / "work" / "spill"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Writes a folder of safetensors with a pickle and hidden files, like a snapshot of the Hub."""
    folder = tmp_path / "driver" / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for name, text in {"model.safetensors": "w" * 100, "config.json": "{}", "1_Pooling/config.json": "[]",
                       "pytorch_model.bin": "pickle", "own.py": "code", ".cache/x.json": "x"}.items():  # fmt: skip
        (folder / name).write_text(text)
    return folder


def cached() -> list[Path]:
    return [p for p in local_files.cache(shipping.SHIPPED).glob("*") if p.is_dir()]


def test_a_path_with_the_files_is_used_and_nothing_is_copied(spill, model):
    assert here(spill, describe("model", str(model))) == str(model)
    assert not cached() and not Path(spill.path).exists()


def test_a_file_is_hashed_once_in_a_process_while_it_stays_as_it_is(spill, model, monkeypatch):
    read, real = [], files.hashlib.file_digest
    monkeypatch.setattr(files.hashlib, "file_digest", lambda *given: read.append(1) or real(*given))
    described = describe("model", str(model))
    for _ in range(5):
        here(spill, described)
    assert len(read) == 3
    (model / "config.json").write_text("{ }")
    assert describe("model", str(model)) != described and len(read) == 4


@pytest.mark.parametrize("fault", ["absent", "other", "more"])
def test_a_node_without_the_folder_gets_the_files_and_no_pickle(spill, model, fault):
    described = describe("model", str(model))
    kept = shutil.copytree(model, model.parent / "kept")
    if fault == "absent":
        shutil.rmtree(model)
    elif fault == "other":
        (model / "model.safetensors").write_text("v" * 100)
    else:
        (model / "other.safetensors").write_text("v")
    with pytest.raises(NotHereError, match=r"this file on node .* is missing or differs from the driver's"):
        here(spill, described)
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(kept, model)
    offer(spill, described)
    shutil.rmtree(model)
    place = Path(here(spill, described))
    assert place.name == "model" and place != model
    found = sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file())
    assert found == ["1_Pooling/config.json", "config.json", "model.safetensors"]
    assert local_files.is_ours(place.parent.parent)
    shutil.rmtree(spill.path)
    assert here(spill, described) == str(place), "the cache is enough"


def test_a_folder_of_pickles_is_not_copied(spill, model):
    (model / "model.safetensors").unlink()
    described = describe("model", str(model))
    assert here(spill, described) == str(model)
    (model / "pytorch_model.bin").write_text("other")
    with pytest.raises(ConfigError, match=r"because this file can run code\. Save the model as safetensors"):
        here(spill, described)


def test_a_single_file_of_any_kind_is_copied_under_its_name(spill, tmp_path):
    file = tmp_path / "lid.bin"
    file.write_bytes(os.urandom(3000))
    described, data = describe("model", str(file)), file.read_bytes()
    offer(spill, described)
    file.unlink()
    place = Path(here(spill, described))
    assert place.name == "lid.bin" and place.read_bytes() == data


def test_files_are_copied_block_by_block(spill, model, monkeypatch):
    """No process holds a model of many gigabytes in memory."""
    monkeypatch.setattr(shipping, "BLOCK", 16)
    described = describe("model", str(model))
    offer(spill, described)
    shutil.rmtree(model)
    sizes, real = [], shipping._blocks
    monkeypatch.setattr(shipping, "_blocks", lambda *given: (sizes.append(len(b)) or b for b in real(*given)))
    assert (Path(here(spill, described)) / "model.safetensors").read_text() == "w" * 100
    assert max(sizes) == 16 and sum(sizes) == described.bytes


def test_files_of_one_content_and_two_names_are_there_together(spill, tmp_path):
    """A stage may name both, for example two empty lists."""
    described = []
    for name in ("en.txt", "de.txt"):
        (tmp_path / name).write_text("the same")
        described.append(describe("lists", str(tmp_path / name)))
        offer(spill, described[-1])
        (tmp_path / name).unlink()
    places = [Path(here(spill, one)) for one in described]
    assert [(place.name, place.exists()) for place in places] == [("en.txt", True), ("de.txt", True)]


@pytest.mark.parametrize(("path", "below"), [(".", "."), ("..", "1_Pooling")])
def test_a_path_without_a_name_is_copied_into_a_folder_of_its_own(spill, model, monkeypatch, path, below):
    """For example, the folder of a text encoder that is the command's current folder, with its tokenizer next to it."""
    monkeypatch.chdir(model / below)
    described = describe("model", path)
    offer(spill, described)
    (model / "model.safetensors").unlink()
    place = Path(here(spill, described))
    assert place.parent == local_files.cache(shipping.SHIPPED) and (place / "model.safetensors").exists()
    assert [p.name for p in local_files.cache(shipping.SHIPPED).iterdir() if p.suffix != ".lock"] == [described.digest]


def test_a_link_to_a_folder_is_an_error_where_it_would_be_copied(spill, model):
    """Without its target, a node would compute something else with the model, for example vectors with another pooling."""
    (model / "1_Pooling").rename(model.parent / "pooling")
    (model / "1_Pooling").symlink_to(model.parent / "pooling")
    described = describe("model", str(model))
    assert here(spill, described) == str(model)
    with pytest.raises(ConfigError, match=r"model/1_Pooling: is a link to a folder, which heliostat doesn't copy"):
        offer(spill, described)
    assert not Path(spill.path).exists()


def test_what_a_process_left_that_was_killed_while_it_copied_is_removed_by_the_next(spill, model):
    described = describe("model", str(model))
    offer(spill, described)
    shutil.rmtree(model)
    left = local_files.cache(shipping.SHIPPED) / f"{described.digest}.0123abcd.part"
    left.mkdir(parents=True)
    left.parent.chmod(0o700)
    here(spill, described)
    assert not left.exists() and len(cached()) == 1


@pytest.mark.parametrize("where", ["work", "node"])
def test_a_damaged_copy_is_not_used(spill, model, where):
    described = describe("model", str(model))
    offer(spill, described)
    kept = shutil.move(model, model.parent / "kept")
    copies = Path(spill.path, shipping.SHIPPED)
    (weights,) = [p for p in copies.iterdir() if p.stat().st_size == 100]
    if where == "work":
        weights.write_text("v" * 100)
        with pytest.raises(NotHereError, match="was damaged, so heliostat removed this copy"):
            here(spill, described)
        assert not weights.exists() and not cached()
        shutil.move(kept, model)
        offer(spill, described)
        shutil.rmtree(model)
    else:
        (Path(here(spill, described)) / "model.safetensors").write_text("v" * 100)
    assert (Path(here(spill, described)) / "model.safetensors").read_text() == "w" * 100


def test_a_file_that_changed_since_the_start_is_not_offered(spill, model):
    described = describe("model", str(model))
    (model / "model.safetensors").write_text("v" * 100)
    with pytest.raises(ConfigError, match=r"model.safetensors: changed during the run"):
        offer(spill, described)
    assert not list(Path(spill.path, shipping.SHIPPED).glob("*-100"))


def test_one_process_copies_while_others_wait_and_not_forever(spill, model, monkeypatch):
    described = describe("model", str(model))
    offer(spill, described)
    shutil.rmtree(model)
    fetched, real = [], shipping._fetch

    def slow(*given):
        fetched.append(1)
        time.sleep(0.3)
        real(*given)

    monkeypatch.setattr(shipping, "_fetch", slow)
    threads = [threading.Thread(target=here, args=(spill, described)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1 and len(cached()) == 1
    shutil.rmtree(cached()[0])
    monkeypatch.setattr(shipping, "WAIT_S", 0.2)
    monkeypatch.setattr(shipping, "BYTES_PER_S", 1 << 40)
    with (local_files.alone(local_files.cache(shipping.SHIPPED) / described.digest, 1.0),
          pytest.raises(HeliostatError, match=r"another process .* copying .* for 0 s\. Run the command again")):  # fmt: skip
        here(spill, described)
    monkeypatch.setattr(shipping, "WAIT_S", -1.0)
    with pytest.raises(HeliostatError, match="reading is too slow"):
        here(spill, described)


def test_a_disk_without_room_is_one_error_that_names_the_cache(spill, model, monkeypatch):
    described = describe("model", str(model))
    offer(spill, described)
    shutil.rmtree(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 10))
    told = r"heliostat-shipped-\d+/\w+: node .*needs .* bytes, and only 10 are free\)\. Free some space"
    with pytest.raises(HeliostatError, match=told):
        here(spill, described)
    assert not cached()


def test_what_was_not_used_for_a_day_leaves_the_cache(spill, tmp_path):
    places = []
    for name in ("a", "b", "c"):
        file = tmp_path / name
        file.write_text(name)
        described = describe("lists", str(file))
        offer(spill, described)
        file.unlink()
        places.append(Path(here(spill, described)))
        if name == "a":
            os.utime(places[0].parent, (0, 0))
    assert [place.exists() for place in places] == [False, True, True]


def test_the_driver_copies_what_a_task_asks_for_once_and_starts_it_again(tmp_path, spill, model, monkeypatch):
    """If a task asks again for files that the driver has copied, one error ends the run."""
    described = describe("model", str(model))
    monkeypatch.setattr(ray, "nodes", list)
    made = crew.Crew(flow.Flow(Work(Location(str(tmp_path / "work")))), TaskKind("read", flow.execute, print))
    started = crew.Started(0, flow.Task("k", {}))
    made._judge(started, NotHereError("x", described))
    assert made.later == [started] and not made.failed and started.trouble.count == 0 and started.copy
    started.copy.result(10)
    assert len(list(Path(spill.path, shipping.SHIPPED).iterdir())) == 3
    made._judge(started, NotHereError("x", described))
    assert len(made.failed) == 1
    shipping.withdraw(spill)
    assert not Path(spill.path, shipping.SHIPPED).exists()


def test_other_tasks_end_and_start_while_the_driver_copies(tmp_path, model, monkeypatch):
    """The driver copied a model between two checks of the tasks, and started no other task in that time."""
    described, slow, begun = describe("model", str(model)), threading.Event(), list[crew.Started]()
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(crew, "AWAY_S", 0.01)
    monkeypatch.setattr(shipping, "offer", lambda *_: slow.wait(10) and None)
    made = crew.Crew(flow.Flow(Work(Location(str(tmp_path / "work")))), TaskKind("read", flow.execute, print))
    lacking, other = (crew.Started(n, flow.Task(f"{n}", {})) for n in range(2))
    made._judge(lacking, NotHereError("x", described))
    made.later.append(other)
    monkeypatch.setattr(crew.Crew, "start", lambda self, started: begun.append(started))
    assert 0 < made._start_due() <= crew.AWAY_S and begun == [other] and made.busy
    slow.set()
    assert lacking.copy
    lacking.copy.result(10)
    made._start_due()
    assert begun == [other, lacking] and not made.busy


def test_a_copy_that_fails_ends_the_run_by_its_error(tmp_path, model, monkeypatch):
    described = describe("model", str(model))
    monkeypatch.setattr(ray, "nodes", list)
    made = crew.Crew(flow.Flow(Work(Location(str(tmp_path / "work")))), TaskKind("read", flow.execute, print))
    (model / "config.json").write_text("other")
    started = crew.Started(0, flow.Task("k", {}))
    made._judge(started, NotHereError("x", described))
    assert started.copy and isinstance(started.copy.exception(10), ConfigError)
    with pytest.raises(ConfigError, match="changed during the run"):
        made._start_due()


@pytest.mark.parametrize("apart", [False, True])
def test_a_text_encoder_comes_with_its_tokenizer_wherever_that_is(spill, tmp_path, apart):
    """Diffusers' pipelines have the tokenizer next to the encoder's folder. Their other parts aren't copied."""
    root = tmp_path / "driver"
    names = ["vae/config.json", "vae/x.safetensors", "text_encoder/x.safetensors", "unet/x.safetensors"]
    for name in [*names, "tokenizer/tokenizer.json" if apart else "text_encoder/tokenizer.json"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    latents = Latents(autoencoder=str(root / "vae"), text_encoder=str(root / "text_encoder"))
    shipments = latents.shipments()
    assert latents.located(spill, shipments) == latents
    for one in shipments:
        offer(spill, one)
    shutil.rmtree(root)
    made = latents.located(spill, shipments)
    assert Path(made.autoencoder, "config.json").read_text() == "vae/config.json"
    text = Path(made.text_encoder or "")
    assert text.name == "text_encoder" and (text / "x.safetensors").read_text() == "text_encoder/x.safetensors"
    assert (text.parent / "tokenizer" if apart else text).joinpath("tokenizer.json").exists()
    assert not list(local_files.cache(shipping.SHIPPED).rglob("unet"))
    plain = Latents(autoencoder=str(made.autoencoder))
    assert plain.located(spill, plain.shipments()) == plain
