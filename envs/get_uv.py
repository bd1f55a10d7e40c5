"""Put uv's executable into a folder with nothing but Python's standard library: Debian's python3 may lack pip and venv.

python3 envs/get_uv.py .uv/bin
"""

import hashlib
import html
import io
import platform
import re
import sys
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

# The index that everything else is installed from, too.
LOCK = Path(__file__).resolve().parents[1] / "uv.lock"


def index_of(lock: str) -> str:
    """The package index that a uv.lock names first."""
    found = re.search(r'registry = "(https://[^"]+)"', lock)
    if found is None:
        sys.exit("uv.lock names no package index: install uv yourself")
    return found[1]


def main(folder: Path) -> None:
    page = f"{index_of(LOCK.read_text())}/uv/"
    with urllib.request.urlopen(page) as answer:
        links = re.findall(r'href="([^"#]+)#sha256=([0-9a-f]{64})"', answer.read().decode())
    machine = platform.machine()
    system = "manylinux" if platform.system() == "Linux" else "macosx"
    wheels = re.compile(rf".*/uv-(\d+)\.(\d+)\.(\d+)-[^/]*{system}[^/]*{machine}\.whl$")
    fitting = [
        (tuple(map(int, found.groups())), link, digest) for link, digest in links if (found := wheels.match(link))
    ]
    if not fitting:
        sys.exit(f"the package index has no uv for {system} {machine}: install uv yourself")
    _, link, digest = max(fitting)
    with urllib.request.urlopen(urllib.parse.urljoin(page, html.unescape(link))) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != digest:
        sys.exit(f"{link} has not the hash that the package index states: try again")
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        executable = next(name for name in wheel.namelist() if name.endswith(".data/scripts/uv"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "uv").write_bytes(wheel.read(executable))
    (folder / "uv").chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
