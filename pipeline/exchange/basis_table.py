"""The tail basis of an export as one Parquet file: a row for each token, with its offset and its directions.

    t[v] = offset[v] + directions[v] . tail_coordinates             softcap tanh(t / softcap) where there is a softcap

The metadata of its schema has the rest under the key `tail_basis`, as JSON: `softcap`, `digest`, the steps to which the
numbers are rounded, `center` and `projection`, by which the teacher's hidden states h give coordinates, projection
(h - center), and `prediction`, by which a cache predicts them from a head.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..base.errors import CorruptError
from ..store.basis_file import StoredBasis
from ..targets.basis import TailBasis, TailProjection

BASIS_TABLE = "tail_basis.parquet"
"""File of an export with the tail basis, where the cache has one."""
_KEY = b"tail_basis"


def write_basis_table(file: Path, stored: StoredBasis) -> None:
    """Write a basis, decoded."""
    basis = stored.basis()
    about = {
        "softcap": basis.softcap,
        "digest": stored.digest,
        "offset_step": float(stored.offset_step[0, 0]),
        "direction_steps": stored.direction_steps[0].tolist(),
        "center": stored.center[0].tolist(),
        "projection": stored.projection.tolist(),
        "prediction": stored.prediction.tolist(),
    }
    directions = pa.FixedSizeListArray.from_arrays(pa.array(basis.directions.reshape(-1).numpy()), basis.rank)
    table = pa.table({"offset": basis.offset.numpy(), "directions": directions})
    pq.write_table(table.replace_schema_metadata({_KEY: json.dumps(about).encode()}), file, compression="zstd")


def read_basis_table(file: Path, digest: str) -> StoredBasis:
    """The basis of an export. Raises CorruptError for a file that is missing, or not what `export` wrote."""
    try:
        table = pq.read_table(file)
        about = json.loads(table.schema.metadata[_KEY])
        directions = table["directions"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
        center, projection, prediction = (
            torch.tensor(np.asarray(about[name], np.float32)) for name in ("center", "projection", "prediction")
        )
        basis = TailBasis(
            torch.from_numpy(table["offset"].to_numpy().copy()),
            torch.from_numpy(directions.copy()),
            about["softcap"],
            prediction=prediction,
        )
        # The decoded numbers are whole steps, so that rounding them again changes nothing.
        stored = StoredBasis.quantised(
            basis, TailProjection(center, projection), about["offset_step"], about["direction_steps"]
        )
        problem = "" if stored.digest == digest else "its digest is another one"
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, AttributeError) as error:
        problem = repr(error)
    if problem:
        raise CorruptError(f"{file}: not the tail basis that `export` wrote ({problem}): export the cache again")
    return stored
