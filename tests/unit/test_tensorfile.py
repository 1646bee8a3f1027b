"""Tests safetensors files as streams: the library reads them, and a full disk is one clear error."""

import subprocess
import sys
from pathlib import Path

import torch
from heliostat.checkpoint import safetensors_file
from heliostat.checkpoint.checksums import as_bytes, cut
from heliostat.checkpoint.safetensors_file import Entry
from safetensors import safe_open
from safetensors.torch import load_file


def _entry(name: str, tensor: torch.Tensor) -> Entry:
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: cut(as_bytes(tensor)))


def test_the_library_reads_every_type_and_shape(tmp_path: Path) -> None:
    """Including scalars, empty tensors, and odd sizes before larger elements. The offsets are the places of the bytes."""
    tensors = {"odd": torch.tensor([1, 2, 3], dtype=torch.uint8), "empty": torch.zeros(0, 4), "scalar": torch.tensor(7)}
    tensors |= {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in safetensors_file.DTYPES.items()}
    path = tmp_path / "a" / "t.safetensors"
    offsets = safetensors_file.write(path, [_entry(n, t) for n, t in tensors.items()], {"format": "pt", "who": "me"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())
    with safe_open(path, "pt") as f:
        assert f.metadata() == {"format": "pt", "who": "me"}
    data = path.read_bytes()
    for name, tensor in tensors.items():
        assert data[offsets[name] : offsets[name] + tensor.nbytes] == as_bytes(tensor).numpy().tobytes()
        assert offsets[name] % tensor.itemsize == 0


SCRIPT = """
import resource, sys, torch
from pathlib import Path
from heliostat.errors import StorageError
from heliostat.checkpoint.checksums import as_bytes, cut
from heliostat.checkpoint.safetensors_file import Entry, write

def parts():
    yield from cut(as_bytes(torch.ones(2 << 20)))

write(Path(sys.argv[1]), [Entry("a", torch.float32, (2 << 20,), parts)], {})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write(Path(sys.argv[1]), [Entry(str(i), torch.float32, (2 << 20,), parts) for i in range(40)], {})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
try:
    write(Path(sys.argv[1]), [Entry("a", torch.float32, (2 << 20,), parts)], {})
except StorageError as e:
    print(e)
"""


def test_a_file_takes_the_memory_of_one_tensor_and_one_that_may_not_grow_is_a_storage_error(tmp_path: Path) -> None:
    """For forty tensors of 8 MiB, each created at its turn. A file that can't be written is removed."""
    path = tmp_path / "big.safetensors"
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, timeout=60, check=True)
    growth, message = done.stdout.splitlines()
    assert int(growth) < 16
    assert message == f"{path}: can't write this file (file too large). Free some space on this disk"
    assert not path.exists()
