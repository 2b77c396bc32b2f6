"""Coverage-guided fuzzing of the byte formats with atheris: `make fuzz`, or `python -m tests.helpers.fuzz_bytes
-max_total_time=60`.

The first byte chooses what the others are: the chunk of a shard behind valid checksums, stored arrays, or a manifest.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris
import google_crc32c
import numpy as np

with atheris.instrument_imports(include=["logit_cache"]):
    from logit_cache.base.errors import PipelineError
    from logit_cache.store.arrays import Compressed
    from logit_cache.store.codec import TargetCodec
    from logit_cache.store.manifest import Manifest
    from logit_cache.store.shard_reader import ShardReader, read_rows
    from logit_cache.targets.supports import Support

CODECS = [
    TargetCodec(Support.of(support, k=4, p=0.9, tau=0.25, draws=3), (0.5, 1.0), 60, profile, label_log_probs=True)
    for support in ("topk", "topp", "threshold", "sampled")
    for profile in ("compact", "fast")
]
FOLDER = TemporaryDirectory()


def chunk(data: bytes) -> None:
    """The chunk of an array of one row, with an index that fits."""
    checksum = google_crc32c.value(data).to_bytes(4, "little")
    places = np.array([0, len(data) + 4], "<u4").tobytes() + checksum
    index = places + google_crc32c.value(places).to_bytes(4, "little")
    file = Path(FOLDER.name) / "shard"
    file.write_bytes(data + checksum + index)
    place = {"offset": len(data) + 4, "length": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    reader = ShardReader(file, {"codes": "uint16"}, "compact", 1, {"index": place, "size": file.stat().st_size})
    try:
        read_rows([(reader, 0)])["codes"][0](np.empty(100, np.uint16))  # type: ignore[operator]
    finally:
        reader.close()


def arrays(data: bytes) -> None:
    codec = CODECS[data[0] % len(CODECS)]
    layout = codec.layout()
    share = max((len(data) - 1) // len(layout), 1)
    parts = [data[1 + share * place : 1 + share * (place + 1)] for place in range(len(layout))]
    stored: dict[str, list[np.ndarray | Compressed]] = {
        name: [np.frombuffer(part[: len(part) // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize], dtype)]
        for (name, dtype), part in zip(layout.items(), parts, strict=True)
    }
    codec.decode(stored, np.array([[1, 2, 3]]), np.array([[True, False, True]]), np.array([[2, 3, -100]]))


def manifest(data: bytes) -> None:
    (Path(FOLDER.name) / "manifest.json").write_bytes(data)
    Manifest.read(Path(FOLDER.name))


def one_input(data: bytes) -> None:
    try:
        if len(data) > 1:
            (chunk, arrays, manifest)[data[0] % 3](data[1:])
    except (PipelineError, ValueError, IndexError):
        pass  # what the formats promise; the cache turns the last two into exit 4


if __name__ == "__main__":
    corpus = Path(FOLDER.name) / "corpus"
    corpus.mkdir()
    (corpus / "manifest").write_bytes(b"\x02" + json.dumps({"format_version": 4, "layout": {}, "codec": {}}).encode())
    atheris.Setup([*sys.argv, str(corpus)], one_input)
    atheris.Fuzz()
