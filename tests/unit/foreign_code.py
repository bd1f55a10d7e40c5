"""A tokenizer that comes with Python code of its own, as repositories of the hub may hold one."""

from __future__ import annotations

import json
from pathlib import Path


def plant(folder: Path, mark: Path) -> None:
    """Make the tokenizer of a folder one whose own code would make the file `mark`."""
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast\n"
    (folder / "foreign.py").write_text(f"{code}class Foreign(PreTrainedTokenizerFast):\n    pass\n")
    path = folder / "tokenizer_config.json"
    foreign = {"tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": [None, "foreign.Foreign"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | foreign))
