"""Put uv's executable into a folder with nothing but Python's standard library: Debian's python3 may lack pip and venv.

python3 envs/get_uv.py .uv/bin
"""

import hashlib
import io
import json
import platform
import sys
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

INDEX = "https://pypi.org/pypi/uv/json"


def main(folder: Path) -> None:
    system = "manylinux" if platform.system() == "Linux" else "macosx"
    machine = platform.machine()
    with urllib.request.urlopen(INDEX) as answer:
        wheels = json.load(answer)["urls"]
    found = [w for w in wheels if system in w["filename"] and w["filename"].endswith(f"{machine}.whl")]
    if not found:
        sys.exit(f"PyPI has no uv for {system} {machine}: install uv yourself, https://docs.astral.sh/uv")
    with urllib.request.urlopen(urllib.parse.urljoin(INDEX, found[0]["url"])) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != found[0]["digests"]["sha256"]:
        sys.exit(f"{found[0]['url']} has not the hash that PyPI states: try again")
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        executable = next(name for name in wheel.namelist() if name.endswith(".data/scripts/uv"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "uv").write_bytes(wheel.read(executable))
    (folder / "uv").chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
