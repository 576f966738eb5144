"""Trained binary networks from a file, an address or the Hugging Face Hub; the entry point of torch.hub.

    from hubconf import from_pretrained
    net = from_pretrained("runs/NAME/hub")    # a folder of `export.py --to hub-folder`, or a file
    net = from_pretrained("https://example.org/net.safetensors", sha256="9f86d0…")
    net = from_pretrained("OWNER/NAME")       # such a folder on the Hub; or OWNER/NAME@REVISION

    net = torch.hub.load("OWNER/REPOSITORY", "from_pretrained", "https://…")    # without a copy of this repository

The Hub needs `pip install huggingface_hub`. Copy with: export_bits.py, models.py, binarize.py, quantizers.py, runs.py.
"""

import hashlib
import http.client
import re
import tempfile
import urllib.request
from pathlib import Path

from torch import nn

from export_bits import load_bits, one_line
from runs import RunError

dependencies = ["torch", "numpy", "einops", "rich", "safetensors"]  # torch.hub checks that they are installed

FILE = "model.safetensors"  # in a folder of `export.py --to hub-folder`
LARGEST = 4 * 10**9  # bytes of a download; an address may send without end
HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")


def from_pretrained(source: Path | str, net: nn.Module | None = None, *, sha256: str | None = None) -> nn.Module:
    """The network of packed bits, in eval mode, see export_bits.load_bits. Nothing in the file is executed.

    source: a .safetensors file, a folder with model.safetensors, an http or https address, or a repository on the
        Hugging Face Hub, OWNER/NAME or OWNER/NAME@REVISION, unless there is a local folder OWNER. An address is
        downloaded at each call.
    net: your network, made in the way of the one that was saved. Without it, the file must name a network of
        models.build.
    sha256: the SHA-256 that the file must have, 64 hexadecimal digits. The checksum in the file shows only that the
        file is complete, not who wrote it.

    Raises RunError if the file cannot be found, has another SHA-256, is damaged, or does not fit the network.
    """
    source = str(source)
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-fA-F]{64}", sha256)):
        raise RunError(f"sha256 must be 64 hexadecimal digits; it is {sha256!r}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(source)
        try:
            if re.match("https?://", source):
                path = Path(folder, FILE)
                download(source, path)
            elif path.is_dir():
                path = path / FILE
            elif not path.exists() and not path.parent.is_dir() and (match := HUB_NAME.fullmatch(source)):
                path = from_hub(*match.groups())
            if sha256 is not None and path.is_file():
                found = hashlib.sha256(path.read_bytes()).hexdigest()
                if found != sha256.lower():
                    raise RunError(f"{path} has the SHA-256 {found}, not {sha256.lower()}: it is another file")
            return load_bits(path, net)
        except OSError as e:  # a name that is too long
            raise RunError(f"{source:.80} cannot be read ({one_line(e):.80}): check the name") from None
        except RunError as e:
            raise RunError(str(e).replace(str(Path(folder, FILE)), source)) from None


def download(address: str, path: Path) -> None:
    """Write the contents of an address to a file. Raises RunError if it cannot be read, or if it is too large."""
    try:
        with urllib.request.urlopen(address, timeout=60) as response, path.open("wb") as f:
            expected = getattr(response, "length", None) or 0  # None if it is not known
            while max(expected, f.tell()) <= LARGEST and (block := response.read(1 << 20)):
                f.write(block)
            if max(expected, f.tell()) > LARGEST:
                raise RunError(f"{address} sends more than {LARGEST:,} bytes, so it is no network: check the address")
            if f.tell() < expected:
                raise ConnectionError(f"it ended after {f.tell():,} of {expected:,} bytes")
    except (OSError, ValueError, OverflowError, http.client.HTTPException) as e:
        raise RunError(f"{address} cannot be read ({one_line(e)}): check the address and the connection") from None


def from_hub(name: str, revision: str | None) -> Path:
    """The path of a Hub repository's model.safetensors in the cache of huggingface_hub. Raises RunError on failure."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as e:
        raise RunError(
            f"there is no file or folder {name}; for a repository on the Hugging Face Hub, pip install huggingface_hub "
            f"({e})"
        ) from None
    try:
        return Path(hf_hub_download(name, FILE, revision=revision))
    except Exception as e:  # huggingface_hub raises many types
        raise RunError(
            f"{name} is not a file or folder, and {FILE} of that repository cannot be read from the Hugging Face Hub "
            f"({one_line(e)}): check the name and the connection"
        ) from None
